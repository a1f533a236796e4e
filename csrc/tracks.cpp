// Point tracks from depth, and the mean depth of patches: the compiled counterpart of
// gasp_fast/data/tracks/reference.py and gasp_fast/data/depth/pooling.py, which describe what is computed.
//
// Same bits as NumPy. Each line is the same sequence of single IEEE double operations as its NumPy counterpart. What
// could differ is a fused multiply-add, which rounds once instead of twice; contraction is switched off for this file,
// so vectorising for a wider instruction set changes nothing but speed.
//
// Two passes. Ranking needs the visibility of every query, but only a part of the tracks is kept, and writing u, v, z
// of a dense frame takes longer than computing them. So the first pass stores one byte for each query and frame (is it
// visible?) and the second computes the kept tracks again and writes them.
//
// Queries are processed in blocks that stay in the L1 cache; vectorised loops project the block into a frame and read
// the depth there. Threads take blocks of their own and share nothing that is written. The interpreter's lock is
// released. std::thread instead of OpenMP: loader workers are forked, and a forked OpenMP pool hangs.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "arrays.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr int64_t kBlock = 256;  // queries of the first pass: 28 KiB a block
constexpr int64_t kWrite = 64;   // queries of the second pass: their tracks through 24 frames are 36 KiB

struct Map {  // a depth map and the colour image it belongs to
    const float* depth;
    int32_t height, width;
    double image_width, image_height;
    double scale_x, scale_y;  // from image pixels to map pixels
};

struct View {
    Map map;
    double fx, fy, cx, cy;
    double m[12];  // from camera 0 to this camera, row by row
};

// Points in camera 0, then their projections into one view. Flags are doubles, 1 or 0, and every array is filled by a
// loop of its own, so that the compiler can vectorise all of them.
struct Block {
    double x0[kBlock], y0[kBlock], z0[kBlock];
    double u[kBlock], v[kBlock], z[kBlock], inside[kBlock];
    double left[kBlock], top[kBlock];  // the upper left of the four map pixels around (u, v)
    int32_t corner[4][kBlock];         // the places of the four in the map
    float around[4][kBlock];           // the depths of the four
    double agrees[kBlock];
};

// Calls work(block index) for each block, on `threads` threads; the first exception is thrown again here.
template <typename Work>
void for_each_block(int64_t blocks, int threads, Work work) {
    const int64_t used = std::min<int64_t>(threads, blocks);
    if (used <= 1) {
        for (int64_t b = 0; b < blocks; ++b) work(b);
        return;
    }
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    auto loop = [&] {
        try {
            for (int64_t b = next++; b < blocks; b = next++) work(b);
        } catch (...) {
            std::lock_guard<std::mutex> lock(guard);
            failure = std::current_exception();
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int64_t t = 1; t < used; ++t) pool.emplace_back(loop);
    } catch (const std::system_error&) {  // no more threads can start: those that run do the work
    }
    loop();
    for (auto& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
}

void unproject(const double* query, const double* depth, const View& first, int64_t n, Block& b) {
    for (int64_t i = 0; i < n; ++i) {
        b.z0[i] = depth[i];
        b.x0[i] = (query[2 * i] - first.cx) / first.fx * depth[i];
        b.y0[i] = (query[2 * i + 1] - first.cy) / first.fy * depth[i];
    }
}

// (u, v, z) of n points in a view, and whether the projection is far enough inside the image. Behind the camera there
// is no projection: (-1, -1).
FOR_EACH_CPU
void project(const View& shared, int64_t n, double border, Block& b) {
    const View view = shared;  // a local copy: the stores below cannot change it
    const double* m = view.m;
    const double right = view.map.image_width - border, bottom = view.map.image_height - border;
    for (int64_t i = 0; i < n; ++i) {
        const double x0 = b.x0[i], y0 = b.y0[i], z0 = b.z0[i];
        const double z = ((m[8] * x0 + m[9] * y0) + m[10] * z0) + m[11];
        const double x = ((m[0] * x0 + m[1] * y0) + m[2] * z0) + m[3];
        const double y = ((m[4] * x0 + m[5] * y0) + m[6] * z0) + m[7];
        const double divisor = z > 0 ? z : 1.0;
        const double u = view.fx * (x / divisor) + view.cx;
        const double v = view.fy * (y / divisor) + view.cy;
        double inside = z > 0 ? 1.0 : 0.0;
        b.u[i] = z > 0 ? u : -1.0;
        b.v[i] = z > 0 ? v : -1.0;
        b.z[i] = z;
        inside = u >= border ? inside : 0.0;
        inside = u <= right ? inside : 0.0;
        inside = v >= border ? inside : 0.0;
        b.inside[i] = v <= bottom ? inside : 0.0;
    }
}

// visible[i] = inside, and one of the four map pixels around (u, v) agrees with z; seen[i] counts it. No branch: a
// point outside reads pixel 0 and is then masked out. A coarser map may end within the border: clamp.
FOR_EACH_CPU
void check_visibility(const Map& map, int64_t n, double agreement, Block& b, uint8_t* __restrict visible,
          int32_t* __restrict seen) {
    const int32_t last_column = map.width - 1, last_row = map.height - 1, width = map.width;
    const double scale_x = map.scale_x, scale_y = map.scale_y;
    const float* __restrict depth = map.depth;
    for (int64_t i = 0; i < n; ++i) {
        const double left = b.u[i] * scale_x - 0.5, top = b.v[i] * scale_y - 0.5;
        b.left[i] = std::floor(b.inside[i] > 0 ? left : 0.0);
        b.top[i] = std::floor(b.inside[i] > 0 ? top : 0.0);
        b.agrees[i] = 0.0;
    }
    for (int64_t i = 0; i < n; ++i) {
        const int32_t left = static_cast<int32_t>(b.left[i]), top = static_cast<int32_t>(b.top[i]);
        const int32_t x0 = std::max(left, 0), x1 = std::min(left + 1, last_column);
        const int32_t y0 = std::max(top, 0) * width, y1 = std::min(top + 1, last_row) * width;
        b.corner[0][i] = y0 + x0;
        b.corner[1][i] = y0 + x1;
        b.corner[2][i] = y1 + x0;
        b.corner[3][i] = y1 + x1;
    }
    for (int c = 0; c < 4; ++c) {
        for (int64_t i = 0; i < n; ++i) b.around[c][i] = depth[b.corner[c][i]];
        for (int64_t i = 0; i < n; ++i) {
            const double z = b.z[i], d = b.around[c][i];
            const double nearer = z < d ? z : d;
            const double yes = std::fabs(z - d) < agreement * nearer ? 1.0 : b.agrees[i];
            b.agrees[i] = d > 0 ? yes : b.agrees[i];
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const int32_t yes = static_cast<int32_t>(b.agrees[i] * b.inside[i]);
        visible[i] = static_cast<uint8_t>(yes);
        seen[i] += yes;
    }
}

Map map_of(const Array<float>& depth, const double* size, const std::string& name) {
    expect(depth.ndim() == 2 && depth.size() > 0, name + " is not a map of two axes with pixels");
    expect(depth.size() <= (int64_t{1} << 30), name + " has more than 2^30 pixels");
    const int32_t height = static_cast<int32_t>(depth.shape(0)), width = static_cast<int32_t>(depth.shape(1));
    return {depth.data(), height, width, size[0], size[1], width / size[0], height / size[1]};
}

std::vector<Array<float>> maps_of(const py::list& depth) {
    std::vector<Array<float>> maps;
    for (const auto& one : depth) {
        maps.push_back(Array<float>::ensure(one));
        if (!maps.back()) throw py::type_error("depth[" + std::to_string(maps.size() - 1) + "] is not an array");
    }
    return maps;
}

// Indices of the kept queries: seen at least twice, most visible first, ties by index. A counting sort.
std::vector<int64_t> most_visible(const std::vector<int32_t>& seen, int64_t frames, double keep) {
    std::vector<int64_t> start(frames + 2, 0);  // start[c]: where the tracks seen c times begin, high counts first
    for (const int32_t c : seen)
        if (c >= 2) ++start[c - 1];
    for (int64_t c = frames - 1; c >= 0; --c) start[c] += start[c + 1];
    const int64_t kept = static_cast<int64_t>(std::ceil(keep * static_cast<double>(start[0])));
    std::vector<int64_t> order(kept);
    for (size_t q = 0; q < seen.size(); ++q) {
        if (seen[q] < 2) continue;
        const int64_t rank = start[seen[q]]++;
        if (rank < kept) order[rank] = static_cast<int64_t>(q);
    }
    return order;
}

py::tuple track(const Array<double>& query, const py::list& depth, const Array<double>& camera,
                const Array<double>& motion, const Array<double>& size, double border, double agreement, double keep,
                int threads) {
    const std::vector<Array<float>> maps = maps_of(depth);
    const int64_t frames = static_cast<int64_t>(maps.size());
    expect(frames >= 1, "depth is empty");
    expect_shape(query, "query", {query.shape(0), 2});
    expect_shape(camera, "camera", {frames, 4});
    expect_shape(motion, "motion", {frames, 3, 4});
    expect_shape(size, "size", {frames, 2});
    std::vector<View> views(frames);
    for (int64_t f = 0; f < frames; ++f) {
        const double* k = camera.data(f, 0);
        views[f] = {map_of(maps[f], size.data(f, 0), "depth[" + std::to_string(f) + "]"), k[0], k[1], k[2], k[3], {}};
        std::copy_n(motion.data(f, 0, 0), 12, views[f].m);
    }

    std::vector<double> known_query, known_depth;  // the queries whose own depth is known
    std::vector<uint8_t> visible;                  // [F, Q]
    std::vector<int64_t> order;
    {
        py::gil_scoped_release release;
        const Map& map = views[0].map;
        const double* q = query.data();
        known_query.reserve(2 * query.shape(0));
        known_depth.reserve(query.shape(0));
        for (int64_t i = 0; i < query.shape(0); ++i) {
            const int64_t x = std::clamp<int64_t>(std::floor(q[2 * i] * map.scale_x), 0, map.width - 1);
            const int64_t y = std::clamp<int64_t>(std::floor(q[2 * i + 1] * map.scale_y), 0, map.height - 1);
            const float z = map.depth[y * map.width + x];
            if (!(z > 0)) continue;
            known_query.insert(known_query.end(), {q[2 * i], q[2 * i + 1]});
            known_depth.push_back(z);
        }

        const int64_t count = static_cast<int64_t>(known_depth.size());
        std::vector<int32_t> seen(count);
        visible.assign(count * frames, 0);
        for_each_block((count + kBlock - 1) / kBlock, threads, [&](int64_t index) {
            Block block;
            const int64_t from = index * kBlock, n = std::min(kBlock, count - from);
            unproject(&known_query[2 * from], &known_depth[from], views[0], n, block);
            std::fill_n(&visible[from], n, 1);
            std::fill_n(&seen[from], n, 1);
            for (int64_t f = 1; f < frames; ++f) {
                project(views[f], n, border, block);
                check_visibility(views[f].map, n, agreement, block, &visible[f * count + from], &seen[from]);
            }
        });
        order = most_visible(seen, frames, keep);
    }

    const int64_t kept = static_cast<int64_t>(order.size());
    py::array_t<double> out_query({kept, int64_t{2}}), out_uv({kept, frames, int64_t{2}}), out_depth({kept, frames});
    py::array_t<bool> out_visible({kept, frames});
    double *to_query = out_query.mutable_data(), *to_uv = out_uv.mutable_data(), *to_depth = out_depth.mutable_data();
    bool* to_visible = out_visible.mutable_data();
    {
        py::gil_scoped_release release;
        const int64_t count = static_cast<int64_t>(known_depth.size());
        for_each_block((kept + kWrite - 1) / kWrite, threads, [&](int64_t index) {
            Block block;
            double query_of[2 * kWrite], depth_of[kWrite];
            const int64_t from = index * kWrite, n = std::min(kWrite, kept - from);
            for (int64_t i = 0; i < n; ++i) {
                const int64_t q = order[from + i], to = (from + i) * frames;
                query_of[2 * i] = to_query[2 * (from + i)] = to_uv[2 * to] = known_query[2 * q];
                query_of[2 * i + 1] = to_query[2 * (from + i) + 1] = to_uv[2 * to + 1] = known_query[2 * q + 1];
                depth_of[i] = to_depth[to] = known_depth[q];
                for (int64_t f = 0; f < frames; ++f) to_visible[to + f] = visible[f * count + q] != 0;
            }
            unproject(query_of, depth_of, views[0], n, block);
            for (int64_t f = 1; f < frames; ++f) {
                project(views[f], n, border, block);
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t to = (from + i) * frames + f;
                    to_uv[2 * to] = block.u[i];
                    to_uv[2 * to + 1] = block.v[i];
                    to_depth[to] = block.z[i];
                }
            }
        });
    }
    return py::make_tuple(out_query, out_uv, out_visible, out_depth);
}

// Adds one row of a map to the sums of its columns.
FOR_EACH_CPU
void add_row(const float* row, int64_t from, int64_t to, double* total, int32_t* count) {
    for (int64_t x = from; x < to; ++x) {
        const float d = row[x];
        const bool known = (d > 0) & (d <= 3.4028234663852886e38f);  // neither NaN nor infinite
        total[x] += known ? static_cast<double>(d) : 0.0;
        count[x] += known;
    }
}

py::array_t<float> pool(const py::list& depth, const Array<int64_t>& columns, const Array<int64_t>& rows, int threads) {
    const std::vector<Array<float>> maps = maps_of(depth);
    const int64_t frames = static_cast<int64_t>(maps.size());
    expect(columns.ndim() == 2 && rows.ndim() == 2 && columns.shape(0) == frames && rows.shape(0) == frames,
           "columns and rows are [maps, edges]");
    const int64_t across = columns.shape(1) - 1, down = rows.shape(1) - 1;
    const double unit[2] = {1.0, 1.0};
    std::vector<Map> views;
    for (int64_t f = 0; f < frames; ++f) {
        views.push_back(map_of(maps[f], unit, "depth[" + std::to_string(f) + "]"));
        const int64_t *x = columns.data(f, 0), *y = rows.data(f, 0);
        expect(std::is_sorted(x, x + across + 1) && x[0] >= 0 && x[across] <= views[f].width &&
                   std::is_sorted(y, y + down + 1) && y[0] >= 0 && y[down] <= views[f].height,
               "edges of depth[" + std::to_string(f) + "] are not ascending inside the map");
    }
    py::array_t<float> out({frames, down, across});
    float* to = out.mutable_data();
    {
        py::gil_scoped_release release;
        for_each_block(frames, threads, [&](int64_t f) {
            const Map& map = views[f];
            const int64_t *x = columns.data(f, 0), *y = rows.data(f, 0);
            std::vector<double> total(map.width);
            std::vector<int32_t> count(map.width);
            for (int64_t r = 0; r < down; ++r) {
                std::fill(total.begin(), total.end(), 0.0);
                std::fill(count.begin(), count.end(), 0);
                for (int64_t line = y[r]; line < y[r + 1]; ++line)
                    add_row(map.depth + line * map.width, x[0], x[across], total.data(), count.data());
                for (int64_t c = 0; c < across; ++c) {
                    double sum = 0;
                    int64_t known = 0;
                    for (int64_t i = x[c]; i < x[c + 1]; ++i) sum += total[i], known += count[i];
                    to[(f * down + r) * across + c] = static_cast<float>(sum / std::max<int64_t>(known, 1));
                }
            }
        });
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_tracks, module) {
    module.doc() = "Compiled counterpart of gasp_fast.data.tracks.reference and gasp_fast.data.depth.pooling.";
    module.def("track", &track, py::arg("query"), py::arg("depth"), py::arg("camera"), py::arg("motion"),
               py::arg("size"), py::arg("border"), py::arg("agreement"), py::arg("keep"), py::arg("threads"));
    module.def("pool", &pool, py::arg("depth"), py::arg("columns"), py::arg("rows"), py::arg("threads"));
}
