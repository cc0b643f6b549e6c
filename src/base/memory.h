// How much memory the machine can still give, so that too large a request is refused with figures before any
// work.
#pragma once

#include <cstdint>

namespace narrows {

/// Bytes: the lesser of MemAvailable and what the process's control groups still allow; 0 if unknown.
int64_t available_memory_bytes();

/// Resident set now and its peak, bytes; 0 if unknown.
int64_t resident_bytes();
/// The part of it that is the process's own, not a file's that is mapped; -1 if unknown.
int64_t anonymous_resident_bytes();
int64_t peak_resident_bytes();
/// The peak counts anew from here. Does nothing where the system has no such switch.
void forget_peak_resident_bytes();

}  // namespace narrows
