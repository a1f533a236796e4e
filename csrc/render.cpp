// Ray casting of a textured room with textured boxes: colour, exact depth and surface number of each pixel.
//
// One call renders one image on one thread and holds no Python lock, so scenes render side by side in threads.
// Everything is double precision, without fused multiply-adds or reordered sums: the same scene gives the same bytes.
//
// A pixel's depth and surface come from the one ray through its centre: exact, never mixed across an edge. Its colour
// is shaded along the same ray, with mip levels against aliasing; where a neighbouring pixel shows another surface it
// is the mean of `samples x samples` rays spread over the pixel. One lamp lights the room and throws hard shadows.
// Surfaces 0..5 are the room's faces (low x, high x, low y, high y, low z, high z), 6 + 6 b + f is face f of box b.

// Before the headers: the compiler does not inline functions that have other optimisation options.
#pragma GCC optimize("fp-contract=off")

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "arrays.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNear = 1e-6;

struct Vec {
    double at[3];
    double operator[](int axis) const { return at[axis]; }
    double& operator[](int axis) { return at[axis]; }
};

Vec along(const Vec& origin, const Vec& direction, double distance) {
    return {{origin[0] + distance * direction[0], origin[1] + distance * direction[1],
             origin[2] + distance * direction[2]}};
}

// A box is its centre, half extents and rotation; rows of `axes` are the box's own axes in the world.
struct Box {
    Vec centre, half, axes[3];

    Vec direction_inside(const Vec& d) const {
        Vec out;
        for (int k = 0; k < 3; ++k) out[k] = axes[k][0] * d[0] + axes[k][1] * d[1] + axes[k][2] * d[2];
        return out;
    }
    Vec point_inside(const Vec& p) const {
        return direction_inside({{p[0] - centre[0], p[1] - centre[1], p[2] - centre[2]}});
    }
    // Distance at which a ray (in box coordinates) enters, or infinity; `face` is 2 axis + (0 low, 1 high).
    double enter(const Vec& origin, const Vec& direction, int& face) const {
        double first = -kInfinity, last = kInfinity;
        for (int k = 0; k < 3; ++k) {
            const double inverse = 1.0 / direction[k];
            double low = (-half[k] - origin[k]) * inverse, high = (half[k] - origin[k]) * inverse;
            const bool from_high = low > high;
            if (from_high) std::swap(low, high);
            if (low > first) {
                first = low;
                face = 2 * k + (from_high ? 1 : 0);
            }
            last = std::min(last, high);
        }
        return first <= last && first > kNear ? first : kInfinity;
    }
};

// Square grey textures with all their mip levels: level by level, then texture by texture, row-major.
struct Textures {
    const float* texels;
    int count, size, levels;

    double bilinear(int texture, int level, double u, double v) const {
        int64_t start = 0;
        for (int l = 0; l < level; ++l) start += int64_t(count) * (size >> l) * (size >> l);
        const int side = size >> level;  // a power of two: wrapping is a mask
        // One tile further, so that both are positive and truncation is the floor.
        const double x = (u + 1) * side - 0.5, y = (v + 1) * side - 0.5;
        const int column = int(x), row = int(y);
        const double right = x - column, down = y - row;
        const int x0 = column & (side - 1), x1 = (column + 1) & (side - 1);
        const int y0 = row & (side - 1), y1 = (row + 1) & (side - 1);
        const float* base = texels + start + int64_t(texture) * side * side;
        const double top = base[y0 * side + x0] * (1 - right) + base[y0 * side + x1] * right;
        const double bottom = base[y1 * side + x0] * (1 - right) + base[y1 * side + x1] * right;
        return top * (1 - down) + bottom * down;
    }
    // `footprint` is the width of the sample in texels of level 0; two levels are blended.
    double sample(int texture, double u, double v, double footprint) const {
        const double wanted = std::clamp(std::log2(std::max(footprint, 1.0)), 0.0, double(levels - 1));
        const int level = std::min(int(wanted), levels - 2);
        const double fine = bilinear(texture, level, u, v), coarse = bilinear(texture, level + 1, u, v);
        return fine + (coarse - fine) * (wanted - level);
    }
};

struct Hit {
    double distance;
    int surface;
};

struct World {
    Vec low, high, lamp;
    std::vector<Box> boxes;
    const int* surface_texture;
    const double* surface_colour;  // three numbers a surface
    Textures textures;
    double texture_metres;  // the side of one texture tile in the world

    Hit room(const Vec& origin, const Vec& direction) const {
        Hit hit{kInfinity, 0};
        for (int k = 0; k < 3; ++k) {
            const bool up = direction[k] > 0;
            const double distance = ((up ? high[k] : low[k]) - origin[k]) / direction[k];
            if (direction[k] != 0 && distance < hit.distance) hit = {distance, 2 * k + (up ? 1 : 0)};
        }
        return hit;
    }
    bool shadowed(const Vec& point) const {
        const Vec ray{{lamp[0] - point[0], lamp[1] - point[1], lamp[2] - point[2]}};
        for (const Box& box : boxes) {
            int face = 0;
            const double distance = box.enter(box.point_inside(point), box.direction_inside(ray), face);
            if (distance > 1e-4 && distance < 1.0) return true;
        }
        return false;
    }
    void shade(const Vec& origin, const Vec& direction, const Hit& hit, double radians_per_sample,
               double* colour) const;
};

// Texture, times the surface's colour, times the lamp (ambient floor, Lambert's cosine, shadow), times a dark line
// along each edge of the face: the lines let a person read the shape of grey boxes against grey walls.
void World::shade(const Vec& origin, const Vec& direction, const Hit& hit, double radians_per_sample,
                  double* colour) const {
    const Vec point = along(origin, direction, hit.distance);
    const bool in_room = hit.surface < 6;
    const int face = hit.surface % 6, axis = face / 2;
    const int across = axis == 0 ? 1 : 0, upward = axis == 2 ? 1 : 2;
    const double outward = face % 2 ? 1.0 : -1.0;
    Vec local, extent, normal{{0, 0, 0}};
    if (in_room) {
        for (int k = 0; k < 3; ++k) local[k] = point[k] - low[k], extent[k] = high[k] - low[k];
        normal[axis] = -outward;
    } else {
        const Box& box = boxes[(hit.surface - 6) / 6];
        local = box.point_inside(point);
        for (int k = 0; k < 3; ++k) local[k] += box.half[k], extent[k] = 2 * box.half[k];
        for (int k = 0; k < 3; ++k) normal[k] = outward * box.axes[axis][k];
    }

    const double facing = std::abs(direction[0] * normal[0] + direction[1] * normal[1] + direction[2] * normal[2]);
    const double length =
        std::sqrt(direction[0] * direction[0] + direction[1] * direction[1] + direction[2] * direction[2]);
    const double metres = hit.distance * radians_per_sample / std::sqrt(std::max(facing / length, 0.05));
    const double u = local[across] / texture_metres + 0.37 * face, v = local[upward] / texture_metres + 0.21 * face;
    const double grey = textures.sample(surface_texture[hit.surface], u, v, metres / texture_metres * textures.size);

    Vec ray{{lamp[0] - point[0], lamp[1] - point[1], lamp[2] - point[2]}};
    const double reach = std::sqrt(ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]);
    const double cosine = std::max(0.0, (ray[0] * normal[0] + ray[1] * normal[1] + ray[2] * normal[2]) / reach);
    const Vec lifted = along(point, normal, 1e-3);
    const double light = 0.74 + 0.56 * (cosine > 0 && shadowed(lifted) ? 0.0 : cosine);

    const double edge = std::min(std::min(local[across], extent[across] - local[across]),
                                 std::min(local[upward], extent[upward] - local[upward]));
    const double line = in_room ? 0.05 : 0.02, width = std::max(line, metres);  // never thinner than the sample
    const double rim = edge > 8 * width ? 1.0 : 1.0 - 0.45 * line / width * std::exp(-std::max(edge, 0.0) / width);
    for (int c = 0; c < 3; ++c) colour[c] = grey * light * rim * surface_colour[3 * hit.surface + c];
}

// Pixel bounds outside which a box cannot be hit; the whole image when a corner lies behind the camera.
struct Bounds {
    double left, right, top, bottom;
    bool holds(double x, double y) const { return x >= left && x <= right && y >= top && y <= bottom; }
};

Bounds bounds_of(const Box& box, const Vec& eye, const double* rotation, const double* k) {
    Bounds bounds{kInfinity, -kInfinity, kInfinity, -kInfinity};
    for (int corner = 0; corner < 8; ++corner) {
        Vec world = box.centre, camera{{0, 0, 0}};
        for (int a = 0; a < 3; ++a) world = along(world, box.axes[a], corner >> a & 1 ? box.half[a] : -box.half[a]);
        for (int a = 0; a < 3; ++a)
            for (int b = 0; b < 3; ++b) camera[a] += rotation[b * 3 + a] * (world[b] - eye[b]);
        if (camera[2] < 0.05) return {-kInfinity, kInfinity, -kInfinity, kInfinity};
        const double x = k[0] * camera[0] / camera[2] + k[2], y = k[1] * camera[1] / camera[2] + k[3];
        bounds = {std::min(bounds.left, x), std::max(bounds.right, x), std::min(bounds.top, y),
                  std::max(bounds.bottom, y)};
    }
    return {bounds.left - 1e-6, bounds.right + 1e-6, bounds.top - 1e-6, bounds.bottom + 1e-6};
}

struct Camera {
    Vec eye;
    double rotation[9];    // camera to world, row-major
    double intrinsics[4];  // fx, fy, cx, cy

    // The direction has length 1 along the optical axis: a distance along it is a depth.
    Vec ray(double x, double y) const {
        const double a = (x - intrinsics[2]) / intrinsics[0], b = (y - intrinsics[3]) / intrinsics[1];
        Vec out;
        for (int k = 0; k < 3; ++k) out[k] = rotation[3 * k] * a + rotation[3 * k + 1] * b + rotation[3 * k + 2];
        return out;
    }
};

struct Image {
    int width, height, samples;
    float *colour, *depth;
    int* surface;
};

void render_image(const World& world, const Camera& camera, const Image& image) {
    const size_t boxes = world.boxes.size();
    std::vector<Bounds> bounds(boxes);
    std::vector<Vec> eyes(boxes);
    for (size_t b = 0; b < boxes; ++b) {
        bounds[b] = bounds_of(world.boxes[b], camera.eye, camera.rotation, camera.intrinsics);
        eyes[b] = world.boxes[b].point_inside(camera.eye);
    }
    const auto cast = [&](double x, double y, const Vec& direction) {
        Hit hit = world.room(camera.eye, direction);
        for (size_t b = 0; b < boxes; ++b) {
            if (!bounds[b].holds(x, y)) continue;
            int face = 0;
            const double distance = world.boxes[b].enter(eyes[b], world.boxes[b].direction_inside(direction), face);
            if (distance < hit.distance) hit = {distance, 6 + 6 * int(b) + face};
        }
        return hit;
    };
    for (int row = 0; row < image.height; ++row) {
        for (int column = 0; column < image.width; ++column) {
            const Hit hit = cast(column + 0.5, row + 0.5, camera.ray(column + 0.5, row + 0.5));
            image.depth[row * image.width + column] = float(hit.distance);
            image.surface[row * image.width + column] = hit.surface;
        }
    }
    const auto on_edge = [&](int row, int column) {
        const int surface = image.surface[row * image.width + column];
        for (int y = std::max(row - 1, 0); y <= std::min(row + 1, image.height - 1); ++y)
            for (int x = std::max(column - 1, 0); x <= std::min(column + 1, image.width - 1); ++x)
                if (image.surface[y * image.width + x] != surface) return true;
        return false;
    };
    for (int row = 0; row < image.height; ++row) {
        for (int column = 0; column < image.width; ++column) {
            const int samples = on_edge(row, column) ? image.samples : 1;
            const double step = 1.0 / samples, radians = step / camera.intrinsics[0];
            double sum[3] = {0, 0, 0}, colour[3];
            for (int s = 0; s < samples * samples; ++s) {
                const double x = column + (s % samples + 0.5) * step, y = row + (s / samples + 0.5) * step;
                const Vec direction = camera.ray(x, y);
                const int pixel = row * image.width + column;
                const Hit centre{image.depth[pixel], image.surface[pixel]};
                world.shade(camera.eye, direction, samples == 1 ? centre : cast(x, y, direction), radians, colour);
                for (int c = 0; c < 3; ++c) sum[c] += colour[c];
            }
            float* pixel = image.colour + 3 * (row * image.width + column);
            for (int c = 0; c < 3; ++c) pixel[c] = float(sum[c] * step * step);
        }
    }
}

py::tuple render(const Array<double>& room, const Array<double>& lamp, const Array<double>& boxes,
                 const Array<int>& surface_texture, const Array<double>& surface_colour, const Array<float>& texels,
                 int texture_count, int texture_size, double texture_metres, const Array<double>& camera_to_world,
                 const Array<double>& intrinsics, int width, int height, int samples) {
    expect(room.size() == 6 && lamp.size() == 3, "room must hold 2 x 3 numbers and lamp 3");
    expect(boxes.ndim() == 2 && boxes.shape(1) == 15, "boxes must be [B, 15]: centre, half extents, rotation");
    expect(camera_to_world.size() == 16 && intrinsics.size() == 4,
           "camera_to_world must be 4 x 4, intrinsics 4 numbers");
    expect(surface_texture.size() == 6 + 6 * boxes.shape(0), "surface_texture must name a texture for each surface");
    expect(surface_colour.size() == 3 * surface_texture.size(), "surface_colour must hold three numbers a surface");
    expect(width > 0 && height > 0 && samples > 0, "width, height and samples must be positive");
    expect(texture_size >= 2 && (texture_size & (texture_size - 1)) == 0, "texture_size must be a power of two");
    for (py::ssize_t s = 0; s < surface_texture.size(); ++s)
        expect(surface_texture.data()[s] >= 0 && surface_texture.data()[s] < texture_count,
               "surface_texture names no texture");

    World world;
    for (int k = 0; k < 3; ++k) {
        world.low[k] = room.data()[k], world.high[k] = room.data()[3 + k], world.lamp[k] = lamp.data()[k];
    }
    for (py::ssize_t b = 0; b < boxes.shape(0); ++b) {
        const double* numbers = boxes.data(b, 0);
        Box box;
        for (int k = 0; k < 3; ++k) {
            box.centre[k] = numbers[k], box.half[k] = numbers[3 + k];
            for (int j = 0; j < 3; ++j) box.axes[k][j] = numbers[6 + 3 * j + k];  // columns of the rotation
        }
        world.boxes.push_back(box);
    }
    world.surface_texture = surface_texture.data();
    world.surface_colour = surface_colour.data();
    world.texture_metres = texture_metres;
    int levels = 0;
    int64_t expected = 0;
    for (int side = texture_size; side > 0; side /= 2, ++levels) expected += int64_t(texture_count) * side * side;
    expect(texels.size() == expected, "texels must hold every mip level of every texture");
    world.textures = {texels.data(), texture_count, texture_size, levels};

    Camera camera;
    for (int i = 0; i < 3; ++i) {
        camera.eye[i] = camera_to_world.data()[4 * i + 3];
        for (int j = 0; j < 3; ++j) camera.rotation[3 * i + j] = camera_to_world.data()[4 * i + j];
    }
    std::copy(intrinsics.data(), intrinsics.data() + 4, camera.intrinsics);

    Array<float> colour({height, width, 3}), depth({height, width});
    Array<int> surface({height, width});
    const Image image{width, height, samples, colour.mutable_data(), depth.mutable_data(), surface.mutable_data()};
    {
        py::gil_scoped_release unlocked;
        render_image(world, camera, image);
    }
    return py::make_tuple(colour, depth, surface);
}

}  // namespace

PYBIND11_MODULE(_render, module) {
    module.doc() = "Ray casting of textured rooms and boxes: colour, exact depth, surface numbers.";
    module.def("render", &render, py::arg("room"), py::arg("lamp"), py::arg("boxes"), py::arg("surface_texture"),
               py::arg("surface_colour"), py::arg("texels"), py::arg("texture_count"), py::arg("texture_size"),
               py::arg("texture_metres"), py::arg("camera_to_world"), py::arg("intrinsics"), py::arg("width"),
               py::arg("height"), py::arg("samples"),
               "One image of the scene: colour float32 [H, W, 3], depth float32 [H, W], surface int32 [H, W].");
}
