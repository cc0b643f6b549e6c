// A klt layer's transforms on a GPU, and its pages as the kernels there read them: the CPU's numbers, codes
// and scales, with the index token by token and sections at multiples of 16 bytes (narrows/cuda_ops.h).
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"
#include "kv/klt/klt_page.h"
#include "kv/kv_layer.h"
#include "narrows/config.h"

namespace narrows {

/// The most that a page takes there, for any transforms of a profile: pages of all layers have one size.
int64_t klt_device_page_bytes(const KvProfile& profile, const AttentionShape& shape);

class KltCodec {
 public:
  using Parts = std::shared_ptr<const std::vector<KltPart>>;

  /// page_bytes: what a page may take. out_of_memory; internal: it takes more, or the device's errors.
  static Result<std::shared_ptr<const KltCodec>> make(Parts parts, int64_t page_bytes,
                                                      const std::shared_ptr<device::Device>& device,
                                                      device::Stream& stream);

  /// The CPU's, which it is of.
  const Parts& of() const { return of_; }
  const std::vector<narrows_cuda_klt_part>& host_parts() const { return parts_; }
  const narrows_cuda_klt_part* parts() const { return there_.data<const narrows_cuda_klt_part>(); }
  int64_t bytes() const { return there_.bytes(); }

  /// Page of the CPU's -> [page_bytes]; writes all bytes. Thread-safe.
  void convert(const std::byte* page, std::byte* to) const;
  /// And back: all bytes of the CPU's page. Thread-safe.
  void restore(const std::byte* page, std::byte* to) const;

 private:
  KltCodec(Parts parts, int64_t page_bytes) : of_(std::move(parts)), page_bytes_(page_bytes) {}
  /// Where everything lies in a page; false if it does not fit.
  bool lay_out();

  Parts of_;
  int64_t page_bytes_;
  std::vector<narrows_cuda_klt_part> parts_;
  device::Buffer there_;  ///< parts_, then the transforms
};

/// What only writing pages there needs: some times the transforms, made for a prompt and not kept.
class KltForward {
 public:
  /// Of these transforms, in place of others. out_of_memory, internal.
  Status set(const KltCodec& codec, const std::shared_ptr<device::Device>& device, device::Stream& stream);
  /// As device::KltEncodeArgs has them.
  const float* project() const { return there_.data<const float>(); }
  const uint8_t* bits() const { return there_.data<const uint8_t>() + bits_at_; }

 private:
  device::Buffer there_;
  int64_t bits_at_ = 0;
};

}  // namespace narrows
