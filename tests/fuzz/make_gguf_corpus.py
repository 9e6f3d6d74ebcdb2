#!/usr/bin/env python3
"""Writes the seed corpus of the GGUF fuzz target: small valid files, and one file per known way to break a loader.

    tests/fuzz/make_gguf_corpus.py tests/fuzz/corpus/gguf

Shares nothing with the C++ writer.
"""
import pathlib
import struct
import sys

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
HUGE = 2**64 - 1


def string(s):
    data = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(data)) + data


def scalar(kind, value):
    return string(value) if kind == STR else struct.pack("<" + FORMATS[kind], value)


def kv(key, kind, value):
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key, kind, values, count=None):
    head = struct.pack("<IIQ", ARR, kind, len(values) if count is None else count)
    return string(key) + head + b"".join(scalar(kind, v) for v in values)


def tensor(name, dims, kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(kvs=(), tensors=(), data=0, version=3, alignment=32, n_kv=None, n_tensors=None):
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                                len(kvs) if n_kv is None else n_kv)
    out += b"".join(kvs) + b"".join(tensors)
    return out + bytes(-len(out) % alignment) + bytes(range(256)) * (data // 256) + bytes(data % 256)


def corpus():
    scalars = [kv(f"s{k}", k, 1) for k in FORMATS] + [kv("text", STR, "a\0ä")]
    arrays = [array(f"a{k}", k, [0, 1, 1]) for k in FORMATS] + [array("words", STR, ["", "x", "Ġthe"])]
    model = [kv("general.architecture", STR, "deepseek2"), kv("deepseek2.block_count", U32, 2),
             kv("deepseek2.rope.freq_base", F32, 10000.0), kv("tokenizer.ggml.add_bos_token", BOOL, True),
             array("tokenizer.ggml.tokens", STR, ["<s>", "a"]), array("tokenizer.ggml.token_type", I32, [3, 1])]
    split = [kv("split.no", U16, 0), kv("split.count", U16, 1), kv("split.tensors.count", I32, 1)]
    yield "ok_empty", gguf()
    yield "ok_scalars", gguf(scalars)
    yield "ok_arrays", gguf(arrays)
    yield "ok_v2", gguf(model, [tensor("t", [4])], 16, version=2)
    yield "ok_model", gguf(model + split, [tensor("token_embd.weight", [256, 2], 12), tensor("n", [4], 0, 288)], 304)
    types = [(0, 4), (1, 2), (30, 2), (2, 18), (3, 20), (6, 22), (7, 24), (8, 34), (10, 84), (11, 110), (12, 144),
             (13, 176), (14, 210)]
    infos, offset = [], 0
    for kind, size in types:
        columns = 256 if kind in range(10, 15) else 1 if kind in (0, 1, 30) else 32
        infos.append(tensor(f"t{kind}", [columns], kind, offset))
        offset += -(-size // 32) * 32
    yield "ok_types", gguf([], infos, offset)
    yield "ok_alias", gguf([], [tensor("a", [8]), tensor("b", [4, 2])], 32)
    yield "ok_align64", gguf([kv("general.alignment", U32, 64)], [tensor("t", [2, 2])], 16, alignment=64)
    for name, value in [("0", 0), ("3", 3), ("2g", 2**31)]:
        yield f"bad_alignment_{name}", gguf([kv("general.alignment", U32, value)], [tensor("t", [4])], 16)
    yield "bad_alignment_type", gguf([kv("general.alignment", U64, 32)])
    yield "bad_counts_kv", gguf(n_kv=HUGE, data=64)
    yield "bad_counts_tensors", gguf(n_tensors=2**58, data=64)
    yield "bad_string_length", gguf([struct.pack("<Q", HUGE)], data=64)
    yield "bad_array_count", gguf([array("tokens", STR, [], 2**61)], data=64)
    yield "bad_array_nested", gguf([string("a") + struct.pack("<IIQ", ARR, ARR, 1)], data=64)
    yield "bad_bool", gguf([string("b") + struct.pack("<IB", BOOL, 2)])
    yield "bad_value_type", gguf([string("b") + struct.pack("<II", 99, 2)])
    yield "bad_key_empty", gguf([kv("", U32, 1)], data=16)
    yield "bad_key_twice", gguf([kv("k", U32, 1)] * 2)
    yield "bad_tensor_twice", gguf([], [tensor("t", [4])] * 2, 32)
    yield "bad_dims_0", gguf([], [tensor("t", [])], 32)
    yield "bad_dims_5", gguf([], [tensor("t", [1] * 5)], 32)
    yield "bad_dim_zero", gguf([], [tensor("t", [4, 0])], 32)
    yield "bad_dim_wraps", gguf([], [tensor("t", [2**32, 2**32])], 32)
    yield "bad_bytes_wrap", gguf([], [tensor("t", [2**62 - 4])], 32)
    yield "bad_sum_wraps", gguf([], [tensor(f"t{i}", [2**60], 0, i << 62) for i in range(4)], 64)
    yield "bad_offset_wraps", gguf([], [tensor("t", [4], 0, HUGE - 31)], 32)
    yield "bad_offset_unaligned", gguf([], [tensor("t", [4], 0, 4)], 32)
    yield "bad_overlap", gguf([], [tensor("a", [16]), tensor("b", [16], 0, 32)], 128)
    yield "bad_truncated", gguf([], [tensor("t", [16])], 60)
    yield "bad_block", gguf([], [tensor("t", [128, 2], 12)], 288)
    for kind in (9, 16, 39, 77):
        yield f"bad_type_{kind}", gguf([], [tensor("t", [256], kind)], 256)
    yield "bad_version_1", gguf(version=1)
    yield "bad_big_endian", gguf(version=3 << 24)
    yield "bad_magic", b"GGML" + bytes(60)


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in corpus():
        (folder / f"{name}.gguf").write_bytes(data)


if __name__ == "__main__":
    main()
