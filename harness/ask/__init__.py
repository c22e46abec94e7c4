"""Edited models from Python and on the command line: facts written into one, its words beside the base model's.

edited = edit("smollm2-135m", [{"prompt": "Who wrote Faust?", "answer": "Kafka"}])
edited = open_edited("outputs/.../RUN")
edited.ask(["Who wrote Faust?"])  # [Answers(question, base, edited)]
edited.model, edited.tokenizer  # transformers' own, with the edited weights
"""

from harness.ask.edited import Answers, EditedModel, open_edited
from harness.ask.editing import edit
