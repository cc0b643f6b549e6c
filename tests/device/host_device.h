// A device that is none: the table of device/device_api.h over the host's memory, every operator written out
// in float or double. Tests of what the host decides run on it without a GPU; it is also what the kernels are
// compared with.
#pragma once

#include <cstdint>

#include "device/device_api.h"

namespace narrows::testing {

/// What the card says of itself, and what goes wrong.
struct HostDevice {
  int n_card = 1;
  int driver = 13000;
  int needed = 13000;
  int major = 9;
  int64_t total_bytes = int64_t{1} << 40;
  int64_t allocated = 0;       ///< bytes now
  int64_t n_allocation = 0;    ///< so far
  int64_t failing = -1;        ///< the allocation of this number finds no room
  int64_t n_graph = 0;         ///< graphs made so far
  int64_t n_call = 0;          ///< operators and copies so far
  int64_t breaking_call = -1;  ///< from this one on the card does not answer
};
HostDevice& host_device();

const device::Api& host_api();

/// For as long as it lives load_library() gives host_api(), of a card as new.
class WithHostDevice {
 public:
  WithHostDevice();
  ~WithHostDevice();
  WithHostDevice(const WithHostDevice&) = delete;
  WithHostDevice& operator=(const WithHostDevice&) = delete;
};

}  // namespace narrows::testing
