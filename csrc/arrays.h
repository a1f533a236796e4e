// NumPy arrays as the arguments of the extensions.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace py = pybind11;

// Contiguous, row by row. Other arrays are converted, but never where the binding says `noconvert`.
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

inline void expect(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

inline void expect_shape(const py::array& array, const char* name, std::initializer_list<int64_t> shape) {
    const bool same =
        array.ndim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), array.shape());
    expect(same, std::string(name) + " has the wrong shape");
}
