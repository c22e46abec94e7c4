"""The text that second moments of keys are taken over."""

from __future__ import annotations

from dataclasses import dataclass

from config.schema.checks import Section, at_least, filled, share


@dataclass
class CorpusConfig(Section):
    """The text whose keys say what an editor is to leave alone."""

    path: str | None = None
    """Text file, or JSON Lines with a field `text`; null = the shipped samples, too little for more than a trial, which
    a warning says of each run."""
    tokens: int = 10_000_000
    """Read at most; the published runs read 100,000 documents of Wikipedia. Fewer than twice d_k are warned of."""
    window: int = 512
    """Tokens that are read together."""
    questions: float = 0.0
    """Share that training questions have in the second moments, put as facts are, with their answers: those of
    dataset.train_path or, where there is no such file, of zsRE's shipped sample. The rest is the text's; 0 = text
    alone, as published, which says nothing of a form that facts are put in (dataset.prompt_form)."""

    def mistakes(self) -> list[str]:
        return [
            *filled("corpus.path", self.path),
            *at_least("corpus.tokens", self.tokens, 1),
            *at_least("corpus.window", self.window, 2),
            *share("corpus.questions", self.questions),
        ]
