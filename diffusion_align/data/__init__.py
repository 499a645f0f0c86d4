"""Where examples come from: preference pairs, prompts, and the cache of their latents."""

from .cache import MANIFEST, CachedPairs, CacheError, build_cache, fingerprint, require_same_data
from .comparisons import ComparisonBatch, ComparisonExamples, Comparisons, collate_comparisons
from .draws import FixedDraws
from .loader import ExampleLoader, PairLoader, PixelExamples
from .pairs import PairDataset, StreamedPairs, load_examples, load_in_file_order, load_pairs, load_pictures
from .prompts import load_prompts
from .ratings import RatingBatch, RatingExamples, Ratings, collate_ratings
from .reading.stream_loader import StreamLoader
from .transforms import PairTransform, make_buckets
from .types import CorruptImageError, PairBatch, PairRecord

__all__ = [
    "MANIFEST",
    "CacheError",
    "CachedPairs",
    "ComparisonBatch",
    "ComparisonExamples",
    "Comparisons",
    "CorruptImageError",
    "ExampleLoader",
    "FixedDraws",
    "PairBatch",
    "PairDataset",
    "PairLoader",
    "PairRecord",
    "PairTransform",
    "PixelExamples",
    "RatingBatch",
    "RatingExamples",
    "Ratings",
    "StreamLoader",
    "StreamedPairs",
    "build_cache",
    "collate_comparisons",
    "collate_ratings",
    "fingerprint",
    "load_examples",
    "load_in_file_order",
    "load_pairs",
    "load_pictures",
    "load_prompts",
    "make_buckets",
    "require_same_data",
]
