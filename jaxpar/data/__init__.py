"""From text files to global sharded batches, in an order that is a pure function of (seed, step).

    tokens = tokenise(text_files(["notes"]), "cache")          # memory-mapped, once for each content
    train, validation = tokens.split(0.1)                      # by document
    loader = Loader(train, batch_size=64, seq_len=256, seed=0)
    for batch in loader.to(plan):                              # prefetched, global, sharded
        ...

Each part works alone: `Loader` takes any random-access source (a list of dicts of arrays, a grain `MapDataset`).
Grain is imported when the first batch is prefetched.
"""

from ._entropy import (
    bigram_cross_entropy as bigram_cross_entropy,
    bigram_entropy as bigram_entropy,
    unigram_entropy as unigram_entropy,
)
from ._loader import Loader as Loader, Source as Source, pad_batch as pad_batch
from ._pack import Packed as Packed
from ._prefetch import Prefetched as Prefetched, prefetch as prefetch
from ._text import stdlib_sources as stdlib_sources, text_files as text_files
from ._tokenizer import Bytes as Bytes, HuggingFace as HuggingFace, Tokenizer as Tokenizer
from ._tokens import Split as Split, TokenFile as TokenFile, tokenise as tokenise
