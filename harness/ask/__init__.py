"""What an edited model says, beside the base model's words: on the command line, and from Python.

edited = open_edited("outputs/.../RUN")
edited.ask(["Who wrote Faust?"])  # [Answers(question, base, edited)]
edited.model, edited.tokenizer  # transformers' own, with the edited weights
"""

from harness.ask.edited import Answers, EditedModel, open_edited

__all__ = ["Answers", "EditedModel", "open_edited"]
