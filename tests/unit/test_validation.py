"""The C ABI refuses bad arguments by name, before it asks for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashmla_backend import native, sm90
from flashmla_backend.leaves import MAX_LEAVES, MIN_LEAF_PAGES, MIN_SHARED_LEAF_PAGES, ROOM_FLOATS
from flashmla_backend.schedule import MAX_ROUNDS, TILE_TOKENS

KERNELS = Path(__file__).parents[2] / "kernels"

needs_build = pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))

# Addresses are never followed here: every case is refused first, or there is no GPU to follow them.
DECODE = {
    "dtype": 0,
    "shape": (2, 1, 8, 1),  # batch, s_q, h_q, h_kv
    "page_size": 64,
    "num_pages": 10,
    "num_parts": 132,
    "causal": True,
    "softmax_scale": 0.1,
    "q_latent": 16,
    "q_latent_strides": (4608, 4608, 576),
    "q_rope": 1040,
    "q_rope_strides": (4608, 4608, 576),
    "kv": 32,
    "kv_strides": (36864, 576, 576),
    "seq_lens": 4,
    "block_table": 4,
    "block_table_stride": 4,
    "items": 16,
    "part_offsets": 4,
    "split_offsets": 4,
    "query_offsets": 0,
    "planned_lens": 0,
    "faults": 0,
    "out": 16,
    "lse": 4,
    "partial_out": 128,
    "partial_lse": 8,
    "max_leaves": 0,
    "rooms": 0,
    "stream": 0,
}
SCHEDULE = {
    "batch": 2,
    "num_parts": 132,
    "max_leaves": 0,
    "cost": sm90.cost_of(64),
    "seq_lens": 4,
    "items": 16,
    "part_offsets": 4,
    "split_offsets": 4,
    "stream": 0,
}

BOUNDS = {
    "batch": 2,
    "page_size": 64,
    "num_pages": 10,
    "seq_lens": 4,
    "block_table": 4,
    "block_table_stride": 4,
    "table_width": 4,
    "planned_lens": 4,
    "faults": 8,
    "stream": 0,
}


@needs_build
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q_latent": 0}, "q_latent is null; accepted: a device pointer"),
        ({"q_rope": 8}, "q_rope is at 0x8; accepted: a device pointer aligned to 16 bytes"),
        ({"kv": 40}, "kv is at 0x28; .* aligned to 16 bytes"),
        ({"out": 4}, "out is at 0x4; .* aligned to 16 bytes"),
        ({"items": 4}, "items is at 0x4; .* aligned to 16 bytes"),
        ({"seq_lens": 2}, "seq_lens is at 0x2; .* aligned to 4 bytes"),
        ({"partial_out": 0}, "partial_out is null"),
        ({"q_latent_strides": (4608, 4608, 577)}, r"q_latent\.head_stride is 577 elements; accepted: a multiple of 8"),
        ({"planned_lens": 4}, "faults is null; accepted: a device pointer"),
        ({"planned_lens": 2}, "planned_lens is at 0x2; .* aligned to 4 bytes"),
        ({"planned_lens": 4, "faults": 12}, "faults is at 0xc; .* aligned to 8 bytes"),
        ({"max_leaves": 12}, "max_leaves is 12; accepted: 0 or a power of two up to 128"),
        ({"max_leaves": 16}, "rooms is null; accepted: a device pointer"),
        ({"kv_strides": (36860, 576, 576)}, "kv_page_stride is 36860 elements; accepted: a multiple of 8"),
        ({"kv_strides": (0, 576, 576)}, "kv_page_stride is 0 elements; .* from 8 up"),
        ({"page_size": 8}, "page_size is 8; accepted: 16, 32 or a multiple of 64"),
        ({"page_size": 48}, "page_size is 48; accepted: 16, 32 or a multiple of 64"),
        ({"page_size": 96}, "page_size is 96; accepted: 16, 32 or a multiple of 64"),
        ({"page_size": 0}, "page_size is 0"),
        ({"shape": (2, 1, 5, 2)}, "h_q is 5, h_kv 2; accepted: h_q a multiple of h_kv"),
        ({"shape": (2, 0, 5, 1)}, "s_q is 0; accepted: 1 to"),
        ({"shape": (1 << 20, 1 << 10, 128, 1)}, "batch 1048576, s_q 1024 and h_q 128 make too many output rows"),
        ({"shape": (1, 1, 1 << 17, 1 << 17)}, "h_kv is 131072; accepted: 1 to 65535"),
        ({"num_parts": 70000}, "num_parts is 70000; accepted: 1 to 65535"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0; accepted: a finite number greater than 0"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf"),
        ({"dtype": 2}, "dtype is 2; accepted: 0 to 1"),
    ],
)
def test_decode(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.load().decode(**(DECODE | changes))


@needs_build
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 8193}, "batch is 8193; accepted: 0 to 8192"),
        ({"num_parts": 513}, "num_parts is 513; accepted: 1 to 512"),
        ({"max_leaves": 256}, "max_leaves is 256; accepted: 0 or a power of two up to 128"),
        ({"items": 4}, "items is at 0x4"),
        ({"seq_lens": 0}, "seq_lens is null"),
        ({"cost": (0, 1, 1, 1, 1, 1)}, r"cost\.page is 0; accepted: 1 to 65535"),
        ({"cost": (1, 1, 5, 1, 1, 1)}, r"cost\.empty_item is 5; accepted: less than cost\.item \+ cost\.page, 2"),
    ],
)
def test_schedule(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.load().schedule(**(SCHEDULE | changes))


@needs_build
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": -1}, "batch is -1; accepted: 0 to"),
        ({"page_size": 0}, "page_size is 0; accepted: 1 to"),
        ({"num_pages": 0}, "num_pages is 0; accepted: 1 to"),
        ({"table_width": -1}, "table_width is -1; accepted: 0 to"),
        ({"block_table_stride": 3}, "block_table_stride is 3 elements; accepted: at least table_width, 4"),
        ({"seq_lens": 0}, "seq_lens is null"),
        ({"block_table": 2}, "block_table is at 0x2; .* aligned to 4 bytes"),
        ({"planned_lens": 0}, "planned_lens is null"),
        ({"faults": 4}, "faults is at 0x4; .* aligned to 8 bytes"),
    ],
)
def test_check_bounds(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.load().check_bounds(**(BOUNDS | changes))


@needs_build
def test_without_a_hopper_gpu_good_arguments_are_refused_too() -> None:
    if any(device.compute_capability == (9, 0) for device in native.devices()):
        pytest.skip("there is one, and the addresses are made up")
    module = native.load()
    good = [(module.decode, DECODE | {"page_size": size}) for size in (16, 32, 64, 128, 256)]
    for call, arguments in (*good, (module.schedule, SCHEDULE), (module.check_bounds, BOUNDS)):
        with pytest.raises(RuntimeError, match=r"there is no CUDA device|has compute capability .* run on 9\.0"):
            call(**arguments)


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("include/flashmla/schedule.h", "FLASHMLA_SCHEDULE_MAX_ROUNDS", MAX_ROUNDS),
        ("sm90/schedule.cuh", "kPageTokens", TILE_TOKENS),
        ("sm90/leaves.cuh", "kMinLeafPages", MIN_LEAF_PAGES),
        ("sm90/leaves.cuh", "kMinSharedLeafPages", MIN_SHARED_LEAF_PAGES),
        ("include/flashmla/schedule.h", "FLASHMLA_MAX_LEAVES", MAX_LEAVES),
        ("include/flashmla/decode.h", "FLASHMLA_ROOM_FLOATS_OF_16_ROWS", ROOM_FLOATS),
    ],
)
def test_constants_of_the_device_are_the_specifications(file: str, name: str, value: int) -> None:
    """The cost model needs no such test: the device is told it in every call."""
    (found,) = re.findall(rf"{name} = (\d+)(?:[,;]| \}};)", (KERNELS / file).read_text())
    assert int(found) == value
