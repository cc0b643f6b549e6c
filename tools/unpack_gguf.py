#!/usr/bin/env python3
"""Unpacks a GGUF model to float32 weights: unpack_gguf.py MODEL.gguf OUT.gguf  (needs: pip install numpy gguf)

Products with quantised weights round the activations to 8 bits in ggml. The tiniest difference between two correct
engines flips some of these roundings and grows to a KL divergence of some thousandths. On unpacked weights nothing is
rounded, so that two engines can be compared to float precision.
"""
import sys

import gguf


def copy_metadata(reader, writer):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.splitlines()[0])
    reader = gguf.GGUFReader(sys.argv[1])
    writer = gguf.GGUFWriter(sys.argv[2], reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        writer.add_tensor(tensor.name, data.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
