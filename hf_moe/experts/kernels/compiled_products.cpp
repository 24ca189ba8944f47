// The products of a backward pass: out = a b and out = a^T b, summed in float32 and rounded once, in register tiles.

#include "compiled_tiles.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace {

bool has_products(at::ScalarType dtype) {
  return dtype == at::kFloat ? has_tiles<float>() : dtype == at::kBFloat16 && has_tiles<at::BFloat16>();
}

void check(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  const auto dtype = a.scalar_type();
  for (const at::Tensor* t : {&a, &b, &out}) {
    TORCH_CHECK(t->dim() == 2 && t->scalar_type() == dtype, "matrices must be of one dtype");
    TORCH_CHECK(t->size(1) < 2 || t->stride(1) == 1, "rows must be contiguous");
  }
}

#if defined(HF_MOE_TILES)

constexpr int64_t kPacked = 200000;  // lanes of packed panels: three quarters of a second-level cache of 1 MB

// Columns whose panels are packed at a time: what fits, and a share for every thread.
int64_t group_of(int64_t columns, int64_t lanes, int64_t threads) {
  const int64_t share = (columns + threads - 1) / threads;
  const int64_t panels = std::min(kPacked / lanes, share + kTileColumns - 1) / kTileColumns;
  return std::max<int64_t>(1, panels) * kTileColumns;
}

// Passes over the summed axis add up in float32: in `out` itself, or beside it.
template <typename T>
void run_product(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) {
  constexpr bool exact = std::is_same_v<T, float>;
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1), row = a.stride(0) / kPerLane<T>, stride = out.stride(0);
  const int64_t most = exact ? 192 : lanes_of<T>(k) * 2 * kTileColumns <= kPacked ? k : 1024;
  const int64_t depth = (even_part(k, most) + kPerLane<T> - 1) / kPerLane<T> * kPerLane<T>, lanes = lanes_of<T>(depth);
  const int64_t group = group_of(n, lanes, at::get_num_threads());
  const uint32_t* left = static_cast<const uint32_t*>(a.const_data_ptr());
  const T* right = b.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  at::parallel_for(0, (n + group - 1) / group, 1, [&](int64_t from, int64_t to) {
    uint32_t* panels = scratch<0>(lanes * group);
    std::vector<float> sums(exact || depth >= k ? 0 : m * group);
    for (int64_t begin = from * group; begin < std::min(n, to * group); begin += group) {
      const int64_t columns = std::min(group, n - begin);
      int64_t step = 0;
      do {
        const int64_t count = std::min(depth, k - step), height = lanes_of<T>(count);
        pack_columns(right + step * b.stride(0) + begin, count, b.stride(0), columns, panels);
        auto multiply = [&](auto* to, int64_t width) {
          int vectors;
          for (int64_t j = 0; j < columns; j += 16 * vectors) {
            vectors = panel_vectors(columns - j);
            multiply_panel<T>(m, left + step / kPerLane<T>, row, 1, panels + j * height, vectors, height,
                              step ? to + j : nullptr, width, to + j, width, columns - j);
          }
        };
        if (sums.empty()) {
          multiply(y + begin, stride);
        } else {
          multiply(sums.data(), group);
        }
        step += depth;
      } while (step < k);
      for (int64_t r = 0; !sums.empty() && r < m; ++r) {
        for (int64_t j = 0; j < columns; j += 16) {
          const __mmask16 mask = first_lanes(columns - j);
          store_floats(y + r * stride + begin + j, mask, load_floats(sums.data() + r * group + j, mask));
        }
      }
    }
  });
}

template <typename T>
void run_transposed_product(const at::Tensor& a, const at::Tensor& b, at::Tensor& out) {
  const int64_t rows = a.size(0), m = a.size(1), n = b.size(1), stride = out.stride(0);
  const int64_t depth = std::is_same_v<T, float> ? even_part(rows, 512) : std::max<int64_t>(1, rows);
  const int64_t lanes = lanes_of<T>(depth), group = group_of(n, lanes, 1);
  const T *left = a.const_data_ptr<T>(), *right = b.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  uint32_t* panels = scratch<0>(lanes * group);
  for (int64_t begin = 0; begin < n; begin += group) {
    const int64_t columns = std::min(group, n - begin);
    int64_t step = 0;
    do {
      const int64_t count = std::min(depth, rows - step), height = lanes_of<T>(count);
      pack_columns(right + step * b.stride(0) + begin, count, b.stride(0), columns, panels);
      at::parallel_for(0, (m + kTileRows - 1) / kTileRows, 8, [&](int64_t from, int64_t to) {
        uint32_t* strip = scratch<1>(lanes * kTileRows);
        for (int64_t r = from * kTileRows; r < std::min(m, to * kTileRows); r += kTileRows) {
          const int64_t tall = std::min(kTileRows, m - r);
          for (int64_t p = 0; p < height; ++p) {
            const __m512i x = lanes_of_rows(left + step * a.stride(0) + r, p, count, a.stride(0), first_lanes(tall));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip + p * kTileRows), _mm512_castsi512_si256(x));
          }
          int vectors;
          for (int64_t j = 0; j < columns; j += 16 * vectors) {
            vectors = panel_vectors(columns - j);
            T* here = y + r * stride + begin + j;
            multiply_panel<T>(tall, strip, 1, kTileRows, panels + j * height, vectors, height,
                              step ? here : nullptr, stride, here, stride, columns - j);
          }
        }
      });
      step += depth;
    } while (step < rows);
  }
}

#endif  // HF_MOE_TILES

// a (M, K), b (K, N) -> out (M, N); in bfloat16 K must be even, and so the distance of the rows of a
void product(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
  check(a, b, out);
  TORCH_CHECK(b.size(0) == a.size(1) && out.size(0) == a.size(0) && out.size(1) == b.size(1), "shapes do not match");
  for_tiled(a.scalar_type(), [&](auto* type) {
#if defined(HF_MOE_TILES)
    using T = std::remove_pointer_t<decltype(type)>;
    TORCH_CHECK(a.size(1) % kPerLane<T> == 0 && (a.size(0) < 2 || a.stride(0) % kPerLane<T> == 0),
                "the summed axis must be even");
    run_product<T>(a, b, out);
#endif
  });
}

// a (R, M), b (R, N) -> out (M, N), summed over R
void transposed_product(const at::Tensor& a, const at::Tensor& b, at::Tensor out) {
  check(a, b, out);
  TORCH_CHECK(b.size(0) == a.size(0) && out.size(0) == a.size(1) && out.size(1) == b.size(1), "shapes do not match");
  for_tiled(a.scalar_type(), [&](auto* type) {
#if defined(HF_MOE_TILES)
    run_transposed_product<std::remove_pointer_t<decltype(type)>>(a, b, out);
#endif
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_moe_compiled, m) {
  m.def("has_products(ScalarType dtype) -> bool", has_products);
  m.def("product(Tensor a, Tensor b, Tensor(a!) out) -> ()");
  m.def("transposed_product(Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(hf_moe_compiled, CPU, m) {
  m.impl("product", product);
  m.impl("transposed_product", transposed_product);
}
