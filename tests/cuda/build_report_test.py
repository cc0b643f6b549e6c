#!/usr/bin/env python3
"""tools/cuda_build_check sees a spill in what ptxas writes, and none where there is none."""
import importlib.machinery
import importlib.util
import sys

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size
"""

loader = importlib.machinery.SourceFileLoader('cuda_build_check', sys.argv[1])
spec = importlib.util.spec_from_loader('cuda_build_check', loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
found = list(module.kernels(REPORT))
assert found == [('_Z4goodv', 'sm_80', 0, 0, 0, 40), ('_Z3badv', 'sm_90a', 16, 12, 8, 128)], found
print('both kernels seen')
