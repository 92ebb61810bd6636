"""Read, write, validate and pack the on-disk format of sketched checkpoints. See SPEC.md."""

from .dtypes import FLOAT_STORAGE, ITEM_BYTES, TABLE_DTYPES, from_float32, to_float32
from .errors import FormatError, SpallmError
from .files import (
    load_json,
    open_regular,
    read_json,
    read_small,
    refuse_costly_json,
    refuse_pointer,
    sha256,
    to_json,
)
from .float8 import FLOAT8_DTYPES, float4_to_float32, float8_to_float32
from .header import (
    StoredTensor,
    TensorSpec,
    build_header,
    header_length,
    header_metadata,
    header_text,
    parse_header,
    read_header,
)
from .layout import INDEX_FILE, SHARDS_GLOB, SINGLE_SHARD, Shard, index_json, plan_shards
from .metadata import FORMAT_VERSION, MAPPINGS, QUANT_METHOD, SketchMetadata
from .module import (
    INDEX_MAP_SUFFIX,
    SCALE_ENDING,
    SHIFT_ENDING,
    TABLE_ENDING,
    TABLE_SUFFIX,
    SketchedModule,
)
from .packing import pack, pack_reference, row_bytes, unpack, unpack_reference
from .publishing import CONFIG_FILE, check_replaceable
from .reader import SketchedCheckpoint, open_shards, read_bytes, read_index
from .shard_file import ShardFile
from .staging import Staging
from .tables import (
    TABLES_DTYPES,
    TABLES_FILE,
    TABLES_METADATA_FILE,
    TablesMetadata,
    fingerprint,
    map_digest,
    tables_digest,
)
from .text import printable, shown, summary
from .work_folder import check_output_folder, is_inside, is_unfinished, remove_leftovers

__all__ = [
    "CONFIG_FILE",
    "FLOAT8_DTYPES",
    "FLOAT_STORAGE",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "INDEX_MAP_SUFFIX",
    "ITEM_BYTES",
    "MAPPINGS",
    "QUANT_METHOD",
    "SCALE_ENDING",
    "SHARDS_GLOB",
    "SHIFT_ENDING",
    "SINGLE_SHARD",
    "TABLES_DTYPES",
    "TABLES_FILE",
    "TABLES_METADATA_FILE",
    "TABLE_DTYPES",
    "TABLE_ENDING",
    "TABLE_SUFFIX",
    "FormatError",
    "Shard",
    "ShardFile",
    "SketchMetadata",
    "SketchedCheckpoint",
    "SketchedModule",
    "SpallmError",
    "Staging",
    "StoredTensor",
    "TablesMetadata",
    "TensorSpec",
    "build_header",
    "check_output_folder",
    "check_replaceable",
    "fingerprint",
    "float4_to_float32",
    "float8_to_float32",
    "from_float32",
    "header_length",
    "header_metadata",
    "header_text",
    "index_json",
    "is_inside",
    "is_unfinished",
    "load_json",
    "map_digest",
    "open_regular",
    "open_shards",
    "pack",
    "pack_reference",
    "parse_header",
    "plan_shards",
    "printable",
    "read_bytes",
    "read_header",
    "read_index",
    "read_json",
    "read_small",
    "refuse_costly_json",
    "refuse_pointer",
    "remove_leftovers",
    "row_bytes",
    "sha256",
    "shown",
    "summary",
    "tables_digest",
    "to_float32",
    "to_json",
    "unpack",
    "unpack_reference",
]
