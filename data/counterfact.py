"""CounterFact: statements to be finished with a false object, in each of the forms it is passed around in."""

from __future__ import annotations

from data.dataset import Dataset, Row, answer, choice, question, question_or_none, samples, subject, text, texts_or_none
from data.records import EditRecord, Question


def to_record(row: Row, index: int, seed: int) -> EditRecord:
    """The row's own fields say which form it has: ROME's (requested_rewrite), zsRE's (src) or EasyEdit's (prompt).

    Locality prompts are statements to be finished, so they get no question mark, under zsRE's names neither.
    """
    form = next((form for mark, form in FORMS.items() if mark in row), None)
    if form is None:
        raise ValueError(f"none of the fields {', '.join(FORMS)}; it has {', '.join(map(str, row)) or 'none'}")
    return form(row, index, seed)


def _easy_edit(row: Row, index: int, seed: int) -> EditRecord:
    return EditRecord(
        index,
        edit=question(row, "prompt", "target_new"),
        rephrase=question_or_none(row, "rephrase_prompt", "target_new"),
        locality=question_or_none(row, "locality_prompt", "locality_ground_truth"),
        subject=subject(row, "subject"),
    )


def _zsre(row: Row, index: int, seed: int) -> EditRecord:
    return EditRecord(
        index,
        edit=question(row, "src", "ans"),
        rephrase=question_or_none(row, "rephrase", "ans"),
        locality=question_or_none(row, "loc", "loc_ans"),
        subject=subject(row, "subject"),
    )


def _rome(row: Row, index: int, seed: int) -> EditRecord:
    """One paraphrase and one neighbourhood prompt, chosen by (seed, row); neighbours share the old object."""
    rewrite = _object(row, "requested_rewrite")
    prompt, about = text(rewrite, "prompt"), text(rewrite, "subject")
    if "{}" not in prompt:
        raise ValueError(f"requested_rewrite.prompt {prompt!r} has no {{}} where the subject belongs")
    new, old = (answer(_object(rewrite, target), "str") for target in ("target_new", "target_true"))
    chosen, paraphrases = choice(seed, index), texts_or_none(row, "paraphrase_prompts")
    neighbours = texts_or_none(row, "neighborhood_prompts")
    return EditRecord(
        index,
        edit=Question(prompt.replace("{}", about), new),
        rephrase=None if paraphrases is None else Question(chosen.choice(paraphrases), new),
        locality=None if neighbours is None else Question(chosen.choice(neighbours), old),
        subject=about.strip(),
    )


def _object(row: Row, name: str) -> Row:
    if not isinstance(row.get(name), dict):
        raise ValueError(f"field {name!r} is not an object" if name in row else f"no field {name!r}")
    return row[name]


FORMS = {"requested_rewrite": _rome, "src": _zsre, "prompt": _easy_edit}

DATASET = Dataset(
    "counterfact",
    (
        *("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth", "subject"),
        *("src", "rephrase", "ans", "loc", "loc_ans"),
        *("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
    ),
    to_record,
    raw_files={
        "train": ("counterfact/counterfact_train.json", "counterfact/counterfact-train.json"),
        "eval": (
            "counterfact/counterfact_eval.json",
            "counterfact/counterfact-edit.json",
            "counterfact/counterfact.json",
        ),
    },
    sample_files=samples("counterfact"),
    fetchable=False,
)
