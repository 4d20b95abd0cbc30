// The two things of OpenCV that FFCV's extension uses, so that FFCV compiles without OpenCV: a view
// of 8-bit RGB pixels, and cv::resize(..., INTER_AREA), to the nearest grey level.
//
// Every output pixel is a weighted mean of source pixels, with a weight per column times a weight
// per row. With integer weights that sum to the source's length the mean is exact: sums of integers,
// divided once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#define CV_8UC3 16

namespace cv {

enum InterpolationFlags { INTER_AREA = 3 };

struct Size {
    int width, height;
};

// A view: it owns nothing. `step` is the number of bytes from one row to the next.
struct Mat {
    uint8_t *data;
    int rows, cols;
    size_t step;

    Mat(int rows, int cols, int /* CV_8UC3 */, uint8_t *data)
        : Mat(data, rows, cols, 3 * size_t(cols)) {}

    Mat rowRange(int start, int end) const {
        check_range(start, end, rows);
        return Mat(data + start * step, end - start, cols, step);
    }
    Mat colRange(int start, int end) const {
        check_range(start, end, cols);
        return Mat(data + 3 * size_t(start), rows, end - start, step);
    }
    Size size() const { return {cols, rows}; }

private:
    Mat(uint8_t *data, int rows, int cols, size_t step)
        : data(data), rows(rows), cols(cols), step(step) {}

    static void check_range(int start, int end, int length) {
        if (start < 0 || start > end || end > length)
            throw std::out_of_range("crop outside of the image");
    }
};

// Along one axis: output i is the mean of inputs first[i], first[i] + 1, ..., with the weights from
// begin[i] to begin[i + 1].
struct Taps {
    std::vector<int> first;
    std::vector<size_t> begin{0};
    std::vector<uint32_t> weights;

    // Output i covers [i·input, (i + 1)·input) and input j covers [j·output, (j + 1)·output), in
    // units of 1 / (input·output) of the axis. The weight of j is what they have in common.
    static Taps area(int64_t input, int64_t output) {
        Taps taps;
        for (int64_t i = 0; i < output; ++i) {
            const int64_t start = i * input, end = start + input;
            taps.first.push_back(int(start / output));
            for (int64_t j = start / output; j * output < end; ++j)
                taps.weights.push_back(
                    uint32_t(std::min(end, (j + 1) * output) - std::max(start, j * output)));
            taps.begin.push_back(taps.weights.size());
        }
        return taps;
    }

    // OpenCV's coordinates for growing by INTER_AREA: an output that lies within one input is that
    // input, and one that lies across the border of two is their mean by coverage. In the mixed case
    // OpenCV uses it for the shrinking axis as well.
    static Taps linear(int64_t input, int64_t output) {
        Taps taps;
        for (int64_t i = 0; i < output; ++i) {
            const int64_t j = i * input / output;
            const int64_t next = std::max<int64_t>(0, (i + 1) * input - (j + 1) * output);
            taps.first.push_back(int(j));
            if (next == 0) {
                taps.weights.push_back(uint32_t(input));
            } else {
                taps.weights.push_back(uint32_t(input - next));
                taps.weights.push_back(uint32_t(next));
            }
            taps.begin.push_back(taps.weights.size());
        }
        return taps;
    }
};

inline void resize(const Mat &source, Mat &target, Size size, double, double, int) {
    if (source.rows < 1 || source.cols < 1 || size.width < 1 || size.height < 1)
        throw std::invalid_argument("resize from or to an empty image");
    const bool shrinks = size.width <= source.cols && size.height <= source.rows;
    const auto make_taps = shrinks ? Taps::area : Taps::linear;
    const Taps vertical = make_taps(source.rows, size.height);
    const Taps horizontal = make_taps(source.cols, size.width);

    // Half a level is added before the division that truncates. The quarter outweighs any rounding
    // of the product, so that the result does not depend on compiler or machine.
    const double total = double(source.rows) * source.cols;
    const double scale = 1.0 / total, half = total / 2 + 0.25;

    // Rows first: that loop runs over bytes that lie side by side, which the compiler vectorises.
    const size_t row_bytes = 3 * size_t(source.cols);
    std::vector<uint32_t> sums(row_bytes);
    for (int y = 0; y < size.height; ++y) {
        std::fill(sums.begin(), sums.end(), 0);
        const uint8_t *row = source.data + vertical.first[y] * source.step;
        for (size_t k = vertical.begin[y]; k < vertical.begin[y + 1]; ++k, row += source.step) {
            const uint32_t weight = vertical.weights[k];
            for (size_t b = 0; b < row_bytes; ++b) sums[b] += weight * row[b];
        }
        uint8_t *out = target.data + y * target.step;
        for (int x = 0; x < size.width; ++x, out += 3) {
            const uint32_t *pixel = sums.data() + 3 * size_t(horizontal.first[x]);
            uint64_t red = 0, green = 0, blue = 0;
            for (size_t k = horizontal.begin[x]; k < horizontal.begin[x + 1]; ++k, pixel += 3) {
                const uint64_t weight = horizontal.weights[k];
                red += weight * pixel[0];
                green += weight * pixel[1];
                blue += weight * pixel[2];
            }
            out[0] = uint8_t((double(int64_t(red)) + half) * scale);
            out[1] = uint8_t((double(int64_t(green)) + half) * scale);
            out[2] = uint8_t((double(int64_t(blue)) + half) * scale);
        }
    }
}

}  // namespace cv
