"""The language model: the only room that touches it.

`source` knows where one comes from and what it is before its weights are read; `language_model` is one at work;
`edited` is one of its edit modules, `tracing` what these see, `positions` what is at one position, `offsets` what
another value there does to a loss, `below` the blocks that no edit reaches, `text` what the model writes.
"""

from model.edited import INTEGERS, EditModule, checksums, sha256_of_tensor
from model.language_model import BESIDE_WEIGHTS, LanguageModel
