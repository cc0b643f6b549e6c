// What a fuzz target gives to the driver (fuzz_main.cpp) or to libFuzzer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

/// One input; returns 0. Whatever the bytes are: no crash, no hang, no allocation far beyond the input's
/// size.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

/// Valid inputs to mutate.
std::vector<std::string> fuzz_seeds();

/// True if the target accepted the last input: the driver counts them, since a fuzzer whose inputs are all
/// refused at the first byte tests nothing.
bool fuzz_accepted();
