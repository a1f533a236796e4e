// One pass over a row of similarities: statistics, both loss terms and the gradient, with the row in shared memory.
//
// Triton cannot express this well: a whole row of unequal frames stays in shared memory while warps work on different
// frames, synchronise, exchange a few numbers per frame, and continue. The Triton row operations read the chunk twice
// and write it once (10 bytes for each similarity, with a bf16 gradient); here it is read once and written once (6).
//
// A block computes one row of one layer. Its warps
//   1. load the row, scaled to `s = x r_i r_k / tau`, into shared memory; the own token becomes -inf,
//   2. take frames in turn: maximum and its first place, log-sum-exp, the same over known tokens, expected depth,
//   3. wait for warp 0, which computes from the frames' statistics and the row's matches the terms and the upstream
//      gradients a_f = dL/dlse_f and b_f = dL/dE_f,
//   4. take frames in turn again:
//        dL/dx = (a_f + known_k exp(lse_f - known_lse_f) b_f (v_k - E_f)) exp(s - lse_f) r_i r_k / tau,
//      less the weight of each match at its target, subtracted by one lane in the order of the sorted matches.
// Reductions within a warp are butterflies of fixed shape, sums over matches are sequential: two runs give equal bits.
//
// A plain C interface (pointers, sizes, the stream): no torch header, one library for every torch version.
// Semantics are those of kernels/rows_torch.py with V = 1 and the own token excluded.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>

namespace {

constexpr int WARP = 32;
constexpr int WARPS = 8;
constexpr unsigned ALL = 0xffffffffu;
constexpr float FAR = 40.0f;  // the known tokens get exponentials of their own if their maximum is lower by this much

struct Rows {
  const float* similarity;  // [G, R, n]
  const float* row_scale;   // [G, R]
  const float* token_scale; // [G, n]
  const float* temperature; // []
  const int64_t* own_token; // [R]
  const int64_t* frame_offsets;  // [P + 1]
  const float* values;      // [n]
  const bool* known;        // [n]
  int64_t rows, tokens, frames;
  int64_t token_scale_stride;  // of layers
};

struct Matches {
  const int64_t* start;  // [R * longest + 1]
  const int64_t* order;
  const int64_t* target;
  const float* depth;
  const bool* has_depth;
  int64_t longest, first_token;
};

struct Outputs {
  float* corr;        // [G, M]
  float* depth;       // [G, M]
  int64_t* best;      // [G, M]
  float* confidence;  // [G, M]
  int64_t stride;     // of layers
  const float* corr_weight;  // [G, M], strided; null without gradient
  const float* depth_weight;
  int64_t weight_layer, weight_match;
};

// Statistics and upstream gradients of one frame of the row, in shared memory.
struct Frame {
  float lse, known_lse, expected, peak;
  int64_t best;
  float a, b;
};

__device__ float warp_max(float x) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
  return x;
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
  return x;
}

__device__ int warp_min(int x) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) x = min(x, __shfl_xor_sync(ALL, x, d));
  return x;
}

__device__ void store(float x, float* to) { *to = x; }
__device__ void store(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ void store(float x, __half* to) { *to = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

__device__ void frame_statistics(const Rows& in, const float* s, int start, int end, Frame* out) {
  const int lane = threadIdx.x % WARP;
  float m = -CUDART_INF_F, known_m = -CUDART_INF_F;
  for (int k = start + lane; k < end; k += WARP) {
    m = fmaxf(m, s[k]);
    if (in.known[k]) known_m = fmaxf(known_m, s[k]);
  }
  m = warp_max(m);
  known_m = warp_max(known_m);
  int first = INT32_MAX;
  float sum = 0.0f, known_sum = 0.0f, moment = 0.0f;
  for (int k = start + lane; k < end; k += WARP) {
    if (s[k] == m && m > -CUDART_INF_F) first = min(first, k);
    const float e = m > -CUDART_INF_F ? __expf(s[k] - m) : 0.0f;
    sum += e;
    if (in.known[k] && known_m > -CUDART_INF_F) {
      const float q = m - known_m < FAR ? e : __expf(s[k] - known_m);
      known_sum += q;
      moment += q * in.values[k];
    }
  }
  first = warp_min(first);
  sum = warp_sum(sum);
  known_sum = warp_sum(known_sum);
  moment = warp_sum(moment);
  if (lane == 0) {
    const bool any_known = known_m > -CUDART_INF_F;
    out->lse = m > -CUDART_INF_F ? m + __logf(sum) : m;
    out->known_lse = any_known ? (m - known_m < FAR ? m : known_m) + __logf(known_sum) : -CUDART_INF_F;
    out->expected = any_known ? moment / known_sum : 0.0f;
    out->peak = m;
    out->best = first == INT32_MAX ? -1 : first;
    out->a = out->b = 0.0f;
  }
}

// Terms of every match of the row, and the frames' upstream gradients. One warp; each lane takes every 32nd frame.
__device__ void loss_terms(const Matches& matches, const Outputs& out, const float* s, Frame* frames, int64_t count,
                            int64_t row, int64_t layer, bool sequence_negatives, float eps) {
  const int lane = threadIdx.x % WARP;
  float m = -CUDART_INF_F;
  for (int64_t f = lane; f < count; f += WARP) m = fmaxf(m, frames[f].lse);
  m = warp_max(m);
  float sum = 0.0f;
  for (int64_t f = lane; f < count; f += WARP) sum += m > -CUDART_INF_F ? expf(frames[f].lse - m) : 0.0f;
  const float sequence_lse = m + logf(warp_sum(sum));
  float row_weight = 0.0f;
  for (int64_t f = lane; f < count; f += WARP) {
    Frame& frame = frames[f];
    const int64_t cell = row * matches.longest + f;
    float frame_weight = 0.0f, depth_slope = 0.0f;
    for (int64_t at = matches.start[cell]; at < matches.start[cell + 1]; ++at) {
      const int64_t match = matches.order[at], to = layer * out.stride + match;
      const float positive = s[matches.target[at] - matches.first_token];
      out.corr[to] = (sequence_negatives ? sequence_lse : frame.lse) - positive;
      out.best[to] = frame.best + matches.first_token;
      out.confidence[to] = expf(frame.peak - frame.lse);
      const float depth = matches.depth[at], total = depth + frame.expected + eps, distance = depth - frame.expected;
      out.depth[to] = matches.has_depth[at] ? fabsf(distance) / total : 0.0f;
      if (!out.corr_weight) continue;
      const int64_t weight = layer * out.weight_layer + match * out.weight_match;
      frame_weight += out.corr_weight[weight];
      if (matches.has_depth[at]) {
        const float sign = distance > 0.0f ? 1.0f : distance < 0.0f ? -1.0f : distance;
        depth_slope += out.depth_weight[weight] * (-sign / total - fabsf(distance) / (total * total));
      }
    }
    frame.a = frame_weight;
    frame.b = depth_slope;
    row_weight += frame_weight;
  }
  if (!sequence_negatives) return;
  row_weight = warp_sum(row_weight);
  for (int64_t f = lane; f < count; f += WARP)
    frames[f].a = frames[f].lse > -CUDART_INF_F ? row_weight * expf(frames[f].lse - sequence_lse) : 0.0f;
}

template <class E>
__device__ void frame_gradient(const Rows& in, const Matches& matches, const Outputs& out, float* s, const Frame& frame,
                               int start, int end, int own, int64_t row, int64_t f, int64_t layer, float factor,
                               const float* token_scale, E* x) {
  const int lane = threadIdx.x % WARP;
  const bool far = !(frame.lse - frame.known_lse < FAR);  // also where no token is known
  const float ratio = far ? 0.0f : expf(frame.lse - frame.known_lse);
  for (int k = start + lane; k < end; k += WARP) {
    float g = 0.0f;
    if (k != own && frame.lse > -CUDART_INF_F) {
      const float pull = in.known[k] ? frame.b * (in.values[k] - frame.expected) : 0.0f;
      g = (frame.a + ratio * pull) * __expf(s[k] - frame.lse);
      if (far && pull != 0.0f) g += pull * __expf(s[k] - frame.known_lse);
      g *= token_scale[k] * factor;
    }
    s[k] = g;
  }
  __syncwarp();
  if (lane == 0) {
    const int64_t cell = row * matches.longest + f;
    for (int64_t at = matches.start[cell]; at < matches.start[cell + 1]; ++at) {
      const int64_t column = matches.target[at] - matches.first_token;
      const float weight = out.corr_weight[layer * out.weight_layer + matches.order[at] * out.weight_match];
      s[column] -= weight * token_scale[column] * factor;
    }
  }
  __syncwarp();
  for (int k = start + lane; k < end; k += WARP) store(s[k], x + k);
}

template <class E>
__global__ void __launch_bounds__(WARP * WARPS)
    fused_rows(Rows in, Matches matches, Outputs out, bool sequence_negatives, float eps, E* x) {
  extern __shared__ __align__(16) unsigned char shared[];
  Frame* frames = reinterpret_cast<Frame*>(shared);
  float* s = reinterpret_cast<float*>(frames + in.frames);
  const int64_t row = blockIdx.x, layer = blockIdx.y, cell = (layer * in.rows + row) * in.tokens;
  const float factor = in.row_scale[layer * in.rows + row] / *in.temperature;
  const float* token_scale = in.token_scale + layer * in.token_scale_stride;
  const int own = static_cast<int>(in.own_token[row]), warp = threadIdx.x / WARP;

  for (int64_t k = threadIdx.x; k < in.tokens; k += WARP * WARPS)
    s[k] = k == own ? -CUDART_INF_F : in.similarity[cell + k] * (token_scale[k] * factor);
  __syncthreads();
  for (int64_t f = warp; f < in.frames; f += WARPS)
    frame_statistics(in, s, static_cast<int>(in.frame_offsets[f]), static_cast<int>(in.frame_offsets[f + 1]),
                     frames + f);
  __syncthreads();
  if (warp == 0) loss_terms(matches, out, s, frames, in.frames, row, layer, sequence_negatives, eps);
  if (x == nullptr) return;
  __syncthreads();
  for (int64_t f = warp; f < in.frames; f += WARPS)
    frame_gradient(in, matches, out, s, frames[f], static_cast<int>(in.frame_offsets[f]),
                   static_cast<int>(in.frame_offsets[f + 1]), own, row, f, layer, factor, token_scale, x + cell);
}

template <class E>
cudaError_t launch(const Rows& in, const Matches& matches, const Outputs& out, bool sequence_negatives, float eps,
                   void* x, int64_t layers, size_t bytes, cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(fused_rows<E>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(in.rows), static_cast<unsigned>(layers));
  fused_rows<E><<<grid, WARP * WARPS, bytes, stream>>>(in, matches, out, sequence_negatives, eps, static_cast<E*>(x));
  return cudaGetLastError();
}

}  // namespace

// Shared memory that a row of `tokens` in `frames` frames needs; compare with the device's limit before launching.
extern "C" int64_t gasp_fused_rows_bytes(int64_t tokens, int64_t frames) {
  return frames * static_cast<int64_t>(sizeof(Frame)) + tokens * 4;
}

// 0, or a cudaError_t. `element`: 0 float32, 1 bfloat16, 2 float16. `x` null: no gradient.
extern "C" int gasp_fused_rows(const float* similarity, const float* row_scale, const float* token_scale,
                               const float* temperature, const int64_t* own_token, const int64_t* frame_offsets,
                               const float* values, const bool* known, int64_t layers, int64_t rows, int64_t tokens,
                               int64_t frames, int64_t token_scale_stride, const int64_t* start, const int64_t* order,
                               const int64_t* target, const float* depth, const bool* has_depth, int64_t longest,
                               int64_t first_token, float* corr, float* depth_term, int64_t* best, float* confidence,
                               int64_t term_stride, const float* corr_weight, const float* depth_weight,
                               int64_t weight_layer, int64_t weight_match, int sequence_negatives, float eps, void* x,
                               int element, void* stream) {
  const Rows in{similarity,    row_scale, token_scale, temperature, own_token, frame_offsets,
                values,        known,     rows,        tokens,      frames,    token_scale_stride};
  const Matches matches{start, order, target, depth, has_depth, longest, first_token};
  const Outputs out{corr,       depth_term,  best,        confidence, term_stride,
                    corr_weight, depth_weight, weight_layer, weight_match};
  const size_t bytes = static_cast<size_t>(gasp_fused_rows_bytes(tokens, frames));
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const bool all = sequence_negatives != 0;
  if (element == 0) return launch<float>(in, matches, out, all, eps, x, layers, bytes, on);
  if (element == 1) return launch<__nv_bfloat16>(in, matches, out, all, eps, x, layers, bytes, on);
  return launch<__half>(in, matches, out, all, eps, x, layers, bytes, on);
}
