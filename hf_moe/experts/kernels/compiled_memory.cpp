// Asks the system for large pages: new memory then costs a fault per 2 MB instead of one per 4 KB.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// The whole large pages inside a tensor's memory. Advice only: the system may do otherwise, the content is untouched.
void large_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  TORCH_CHECK(tensor.is_contiguous(), "tensor must be contiguous");
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()), end = begin + tensor.nbytes();
  const uintptr_t first = (begin + kLarge - 1) / kLarge * kLarge, last = end / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_moe_compiled, m) { m.def("large_pages(Tensor(a!) tensor) -> ()"); }

TORCH_LIBRARY_IMPL(hf_moe_compiled, CPU, m) { m.impl("large_pages", large_pages); }
