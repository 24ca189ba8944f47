// out = silu(g) u for the halves g and u of each row, and its gradient: one pass over the rows, in float32 inside.

#include "compiled_tiles.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace {

#if defined(HF_MOE_TILES)

// e^x: 2^n e^r with |r| <= ln(2) / 2 and Cephes' polynomial for e^r. Not-a-number stays what it is.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88.5f), _mm512_max_ps(_mm512_set1_ps(-87.5f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <typename Run>
void for_rows(int64_t rows, int64_t width, Run run) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)), [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) {
      for (int64_t i = 0; i < width; i += 16) run(r, i, first_lanes(width - i));
    }
  });
}

#endif  // HF_MOE_TILES

void check(const at::Tensor& projected, const at::Tensor& other) {
  TORCH_CHECK(projected.dim() == 2 && other.dim() == 2 && projected.size(0) == other.size(0) &&
                  projected.size(1) == 2 * other.size(1), "shapes do not match");
  TORCH_CHECK(projected.is_contiguous() && other.is_contiguous(), "tensors must be contiguous");
  TORCH_CHECK(projected.scalar_type() == other.scalar_type(), "dtypes do not match");
}

// projected (R, 2I) -> out (R, I)
void silu_gate(const at::Tensor& projected, at::Tensor out) {
  check(projected, out);
  const int64_t width = out.size(1);
  for_tiled(out.scalar_type(), [&](auto* type) {
#if defined(HF_MOE_TILES)
    using T = std::remove_pointer_t<decltype(type)>;
    const T* h = projected.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    for_rows(out.size(0), width, [&](int64_t r, int64_t i, __mmask16 lanes) {
      const __m512 g = load_floats(h + 2 * r * width + i, lanes), u = load_floats(h + (2 * r + 1) * width + i, lanes);
      store_floats(y + r * width + i, lanes, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
    });
#endif
  });
}

// The gradient (R, I) of the output -> that of projected (R, 2I), in its place: da u silu'(g), and da silu(g)
void silu_gate_backward(at::Tensor projected, const at::Tensor& grad) {
  check(projected, grad);
  const int64_t width = grad.size(1);
  for_tiled(grad.scalar_type(), [&](auto* type) {
#if defined(HF_MOE_TILES)
    using T = std::remove_pointer_t<decltype(type)>;
    T* h = projected.mutable_data_ptr<T>();
    const T* da = grad.const_data_ptr<T>();
    for_rows(grad.size(0), width, [&](int64_t r, int64_t i, __mmask16 lanes) {
      T *gate = h + 2 * r * width + i, *up = gate + width;
      const __m512 g = load_floats(gate, lanes), u = load_floats(up, lanes), d = load_floats(da + r * width + i, lanes);
      const __m512 s = sigmoid(g), one = _mm512_set1_ps(1.f);
      // silu'(g) = s (1 + g (1 - s))
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
      store_floats(gate, lanes, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
      store_floats(up, lanes, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
    });
#endif
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hf_moe_compiled, m) {
  m.def("silu_gate(Tensor projected, Tensor(a!) out) -> ()");
  m.def("silu_gate_backward(Tensor(a!) projected, Tensor grad) -> ()");
}

TORCH_LIBRARY_IMPL(hf_moe_compiled, CPU, m) {
  m.impl("silu_gate", silu_gate);
  m.impl("silu_gate_backward", silu_gate_backward);
}
