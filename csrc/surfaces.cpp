// The terms of predicted points and normals, with their gradient, for CPUs: kernels/surfaces.py says what they are.
//
// A thread takes whole frames. Within one, the points come first: each writes its gradient. Then the blocks of 2 x 2
// points add those of their corners, in a fixed order. Sums of a frame are double. So two runs give the same bits.

#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "arrays.h"

namespace {

constexpr float kSmallestAngle = 0.017453292519943295f, kLargestAngle = 1.5707963267948966f;  // 1 and 90 degrees
constexpr float kHuber = 0.05235987755982989f;                                                // 3 degrees
constexpr float kShortest = 1e-15f;  // normal, as in gasp_fast/g2vlm/losses.py

struct Vector {
    float x, y, z;
    Vector operator+(Vector o) const { return {x + o.x, y + o.y, z + o.z}; }
    Vector operator-(Vector o) const { return {x - o.x, y - o.y, z - o.z}; }
    Vector operator*(float by) const { return {x * by, y * by, z * by}; }
    float dot(Vector o) const { return x * o.x + y * o.y + z * o.z; }
    Vector cross(Vector o) const { return {y * o.z - z * o.y, z * o.x - x * o.z, x * o.y - y * o.x}; }
    float length() const { return std::sqrt(dot(*this)); }
};

Vector at(const float* points, int64_t i) { return {points[3 * i], points[3 * i + 1], points[3 * i + 2]}; }

void add(float* points, int64_t i, Vector v) {
    points[3 * i] += v.x, points[3 * i + 1] += v.y, points[3 * i + 2] += v.z;
}

// weight * |scale predicted - true|, summed over three coordinates; writes its gradient times `share`.
float distance(const float* predicted, const float* true_, float weight, float scale, float share, float* gradient) {
    float sum = 0.0f;
    for (int d = 0; d < 3; ++d) {
        const float off = scale * predicted[d] - true_[d];
        sum += std::fabs(off);
        if (gradient) gradient[d] = off > 0 ? share * weight * scale : off < 0 ? -share * weight * scale : 0.0f;
    }
    return weight * sum;
}

struct Corner {
    float loss;
    Vector to_after, to_before;  // gradients with respect to both sides
};

Corner corner(Vector to_after, Vector to_before, Vector true_normal) {
    const Vector normal = to_after.cross(to_before);
    const float length = normal.length(), true_length = true_normal.length();
    Corner result{kLargestAngle - kHuber / 2, {0, 0, 0}, {0, 0, 0}};
    if (!(length > kShortest)) return result;
    const Vector n = normal * (1 / length), m = true_normal * (1 / true_length);
    const float sine = n.cross(m).length(), cosine = n.dot(m), angle = std::atan2(sine, cosine);
    const float held = angle < kSmallestAngle ? kSmallestAngle : angle > kLargestAngle ? kLargestAngle : angle;
    result.loss = held < kHuber ? held * held / (2 * kHuber) : held - kHuber / 2;
    if (held != angle) return result;
    const float slope = angle < kHuber ? angle / kHuber : 1.0f;
    const Vector g = (n * cosine - m) * (slope / (sine * length));  // with respect to `normal`
    result.to_after = to_before.cross(g);
    result.to_before = g.cross(to_after);
    return result;
}

struct Frame {
    const float *local, *world, *true_local, *true_world, *weight;
    const uint8_t* corners;  // [H - 1, W - 1], bit k: the corner k of the block counts; clockwise from the upper left
    float *local_gradient, *world_gradient;  // null: none
    int64_t height, width;
    float scale, per_coordinate, per_corner;

    void points(double* sums) const {
        for (int64_t i = 0; i < height * width; ++i) {
            float* gl = local_gradient ? local_gradient + 3 * i : nullptr;
            float* gw = world_gradient ? world_gradient + 3 * i : nullptr;
            sums[0] += distance(local + 3 * i, true_local + 3 * i, weight[i], scale, per_coordinate, gl);
            sums[1] += distance(world + 3 * i, true_world + 3 * i, weight[i], scale, per_coordinate, gw);
        }
    }
    void normals(double* sums) const {
        for (int64_t y = 0; y + 1 < height; ++y)
            for (int64_t x = 0; x + 1 < width; ++x) {
                const uint8_t counted = corners[y * (width - 1) + x];
                const int64_t first = y * width + x;
                const int64_t place[4] = {first, first + 1, first + width + 1, first + width};
                for (int k = 0; counted && k < 4; ++k)
                    if (counted >> k & 1) sums[2] += normal(place[(k + 3) % 4], place[k], place[(k + 1) % 4]);
            }
    }
    float normal(int64_t before, int64_t i, int64_t after) const {
        const Vector point = at(local, i), true_point = at(true_local, i);
        const Vector true_normal = (at(true_local, after) - true_point).cross(at(true_local, before) - true_point);
        const Corner c = corner(at(local, after) - point, at(local, before) - point, true_normal);
        if (local_gradient) {
            const Vector to_after = c.to_after * per_corner, to_before = c.to_before * per_corner;
            add(local_gradient, after, to_after);
            add(local_gradient, before, to_before);
            add(local_gradient, i, (to_after + to_before) * -1.0f);
        }
        return c.loss;
    }
};

void surface_terms(const Array<float>& local, const Array<float>& world, const Array<float>& true_local,
                   const Array<float>& true_world, const Array<float>& weight, const Array<uint8_t>& corners,
                   const Array<float>& scale, const Array<float>& per_coordinate, const Array<float>& per_corner,
                   Array<double> sums, std::optional<Array<float>> local_gradient,
                   std::optional<Array<float>> world_gradient, int threads) {
    expect(local.ndim() == 5 && local.shape(4) == 3, "local must be [S, F, H, W, 3]");
    const int64_t samples = local.shape(0), frames = local.shape(1), h = local.shape(2), w = local.shape(3);
    for (const auto* points : {&world, &true_local, &true_world})
        expect_shape(*points, "a set of points", {samples, frames, h, w, 3});
    expect_shape(weight, "weight", {samples, frames, h, w});
    expect_shape(corners, "corners", {samples, frames, std::max<int64_t>(h - 1, 0), std::max<int64_t>(w - 1, 0)});
    for (const auto* factors : {&scale, &per_coordinate, &per_corner})
        expect_shape(*factors, "a factor of samples", {samples});
    expect_shape(sums, "sums", {samples, frames, 3});
    for (const auto* gradient : {&local_gradient, &world_gradient})
        if (*gradient) expect_shape(**gradient, "a gradient", {samples, frames, h, w, 3});
    double* to = sums.mutable_data();
    float* gl = local_gradient ? local_gradient->mutable_data() : nullptr;
    float* gw = world_gradient ? world_gradient->mutable_data() : nullptr;
    const int64_t size = h * w, blocks = corners.size() / std::max<int64_t>(samples * frames, 1);
    py::gil_scoped_release release;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t f = 0; f < samples * frames; ++f) {
        const int64_t s = f / frames, i = f * size;
        const Frame frame{local.data() + 3 * i, world.data() + 3 * i, true_local.data() + 3 * i,
                          true_world.data() + 3 * i, weight.data() + i, corners.data() + f * blocks,
                          gl ? gl + 3 * i : nullptr, gw ? gw + 3 * i : nullptr, h, w,
                          scale.data()[s], per_coordinate.data()[s], per_corner.data()[s]};
        double found[3] = {0, 0, 0};
        frame.points(found);
        frame.normals(found);
        std::copy(found, found + 3, to + 3 * f);
    }
}

}  // namespace

PYBIND11_MODULE(_surfaces, module) {
    module.doc() = "Terms of predicted points and normals; gasp_fast.kernels.surfaces says what they are.";
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };
    module.def("surface_terms", &surface_terms, array("local"), array("world"), array("true_local"),
               array("true_world"), array("weight"), array("corners"), array("scale"), array("per_coordinate"),
               array("per_corner"), array("sums"), array("local_gradient"), array("world_gradient"),
               py::arg("threads"));
}
