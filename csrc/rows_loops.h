// The loops of rows.cpp over one frame of one row, or over one embedding.
//
// Plain C++ that the compiler vectorises, once per instruction set (`FOR_EACH_CPU`), chosen when the library is loaded.
// Reductions carry `omp simd`, which allows the reordering that vectorising needs and nothing else; infinities and
// NaNs keep their meaning.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// ---- Loops over one frame of one row

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, NaN for NaN. Branch-free, so it vectorises.
inline __attribute__((always_inline)) float exp_of_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // the nearest integer, in the low bits
    const float n = shifted - 12582912.0f;
    float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

// out = x (scale factor), rounded just as the gradient's loops round it
FOR_EACH_CPU void scale_row(const float* x, const float* scale, float factor, int64_t n, float* out) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = x[k] * (scale[k] * factor);
}

FOR_EACH_CPU float largest(const float* s, int64_t n) {
    float m = kNone;
#pragma omp simd reduction(max : m)
    for (int64_t k = 0; k < n; ++k) m = s[k] > m ? s[k] : m;
    return m;
}

FOR_EACH_CPU float largest_known(const float* s, const float* known, int64_t n) {
    float m = kNone;
#pragma omp simd reduction(max : m)
    for (int64_t k = 0; k < n; ++k) {
        const float candidate = known[k] != 0.0f ? s[k] : kNone;
        m = candidate > m ? candidate : m;
    }
    return m;
}

// The first k with s[k] == m; n if there is none.
FOR_EACH_CPU int64_t first_equal(const float* s, float m, int64_t n) {
    int32_t at = static_cast<int32_t>(n);
#pragma omp simd reduction(min : at)
    for (int32_t k = 0; k < static_cast<int32_t>(n); ++k) {
        const int32_t candidate = s[k] == m ? k : static_cast<int32_t>(n);
        at = candidate < at ? candidate : at;
    }
    return at;
}

// s = exp(s - m); returns the sum.
FOR_EACH_CPU float exponentiate(float* s, float m, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
        const float e = exp_of_nonpositive(s[k] - m);
        s[k] = e;
        sum += e;
    }
    return sum;
}

// The sum of exp(s - m).
FOR_EACH_CPU float sum_exp(const float* s, float m, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += exp_of_nonpositive(s[k] - m);
    return sum;
}

// out = weight exp(s - m)
FOR_EACH_CPU void weighted_exp(const float* s, float m, float weight, int64_t n, float* out) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) out[k] = weight * exp_of_nonpositive(s[k] - m);
}

FOR_EACH_CPU float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
    return sum;
}

FOR_EACH_CPU float dot3(const float* a, const float* b, const float* c, int64_t n, int64_t stride) {
    float sum = 0.0f;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k] * c[k];
    } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k] * c[k * stride];
    }
    return sum;
}

// g = a exp(s - lse) factor scale, with s = x scale factor
FOR_EACH_CPU void softmax_gradient(const float* x, const float* scale, float factor, float lse, float a, int64_t n,
                                   float* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor;
        g[k] = a * exp_of_nonpositive(x[k] * f - lse) * f;
    }
}

// The same with the gradient of expected values: (a + known ratio deviation) in place of a.
FOR_EACH_CPU void valued_gradient(const float* x, const float* scale, float factor, float lse, float a, float ratio,
                                  const float* known, const float* deviation, int64_t n, float* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor;
        g[k] = (a + known[k] * ratio * deviation[k]) * exp_of_nonpositive(x[k] * f - lse) * f;
    }
}

// g += known deviation exp(s - known_lse) factor scale, where s - known_lse may only be positive for unknown tokens
FOR_EACH_CPU void add_known_gradient(const float* x, const float* scale, float factor, float known_lse,
                                     const float* known, const float* deviation, int64_t n, float* g) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        const float f = scale[k] * factor;
        const float distance = x[k] * f - known_lse;
        g[k] += known[k] * deviation[k] * exp_of_nonpositive(distance > 0.0f ? 0.0f : distance) * f;
    }
}

// deviation = sum_v b_v values_kv - offset
FOR_EACH_CPU void deviation_of_values(const float* values, const float* b, float offset, int64_t n, int64_t width,
                                      float* deviation) {
    if (width == 1) {
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) deviation[k] = b[0] * values[k] - offset;
        return;
    }
    for (int64_t k = 0; k < n; ++k) {
        float sum = -offset;
        for (int64_t v = 0; v < width; ++v) sum += b[v] * values[k * width + v];
        deviation[k] = sum;
    }
}

// ---- Loops over one embedding or gradient, in its element type

struct Bfloat16 {
    uint16_t bits;
};

inline __attribute__((always_inline)) float as_float(float x) {
    return x;
}
inline __attribute__((always_inline)) float as_float(Bfloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
}
inline __attribute__((always_inline)) void put(float x, float* to) {
    *to = x;
}
inline __attribute__((always_inline)) void put(float x, Bfloat16* to) {  // round to nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

#define DEFINE_ELEMENTWISE(E)                                                                                    \
    FOR_EACH_CPU float squared_norm(const E* e, int64_t width) {                                                 \
        float sum = 0.0f;                                                                                        \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t d = 0; d < width; ++d) {                             \
            const float x = as_float(e[d]);                                                                      \
            sum += x * x;                                                                                        \
        }                                                                                                        \
        return sum;                                                                                              \
    }                                                                                                            \
    FOR_EACH_CPU float dot_with(const E* e, const float* u, int64_t width) {                                     \
        float sum = 0.0f;                                                                                        \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t d = 0; d < width; ++d) sum += as_float(e[d]) * u[d]; \
        return sum;                                                                                              \
    }                                                                                                            \
    FOR_EACH_CPU void subtract_multiple(const E* e, const float* u, float factor, int64_t width, E* out) {       \
        _Pragma("omp simd") for (int64_t d = 0; d < width; ++d) put(u[d] - factor * as_float(e[d]), out + d);    \
    }                                                                                                            \
    FOR_EACH_CPU void store_row(const float* g, int64_t n, E* out) {                                             \
        _Pragma("omp simd") for (int64_t k = 0; k < n; ++k) put(g[k], out + k);                                  \
    }
DEFINE_ELEMENTWISE(float)
DEFINE_ELEMENTWISE(Bfloat16)

}  // namespace
