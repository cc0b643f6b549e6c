#include "base/page_array.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace narrows {

namespace {

constexpr size_t kPage = size_t{2} << 20;

}  // namespace

PageArray::PageArray(int64_t bytes) : size_(bytes) {
  // Less than a page: nothing to gain, and rounding up would waste most of it.
  const size_t unit = static_cast<size_t>(bytes) < kPage ? 64 : kPage;
  const size_t rounded = (static_cast<size_t>(bytes) + unit - 1) / unit * unit;
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(unit, rounded == 0 ? unit : rounded)));
  if (data_ == nullptr) size_ = 0;
#ifdef MADV_HUGEPAGE
  if (data_ != nullptr && unit == kPage)
    madvise(data_.get(), rounded, MADV_HUGEPAGE);  // a wish: without it, small pages
#endif
}

void PageArray::Free::operator()(uint8_t* p) const { std::free(p); }

}  // namespace narrows
