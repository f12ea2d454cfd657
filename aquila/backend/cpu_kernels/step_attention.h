// Attention of each row's newest token over that row's cache, in one pass over keys and values.
//
// Queries and keys are turned (rotary embedding), the new key and value are put into the cache, then each task
// attends with the query heads of one key head to one chunk of places: what it reads serves the whole group. The
// chunks' results are put together in their order, so that neither threads nor other rows change a row's result.
// Arithmetic is in fp32.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 256;  // places of a task: keys and values stay in the second cache for the whole group
constexpr int GROUP = 4;        // query heads at once

struct Shape {
    int64_t rows, heads, kv_heads, size;  // size: of a head
    int64_t row_step, head_step;          // elements from one row, one head of the cache to the next
};

// A part of attention: exp(score - most) summed up to `sum`, and their values.
struct Part {
    float most, sum;
};

template <class T>
void turn(T* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        store(x + 2 * i, even * cosines[i] - odd * sines[i]);
        store(x + 2 * i + 1, even * sines[i] + odd * cosines[i]);
    }
}

// Scores of G queries with `count` keys: scores[g * CHUNK + t]. SIZE: the head size where it is known, else 0.
template <int SIZE, int G, class T>
void score(const T* q, const T* keys, int64_t size, int64_t count, float scale, float* scores) {
    const int64_t d = SIZE ? SIZE : size, whole = d / BLOCK * BLOCK;
    for (int64_t first = 0; first < count; first += LANES) {
        Vector sums[G][LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const T* key = keys + std::min(first + lane, count - 1) * d;
            Vector sum[G] = {};
            for (int64_t i = 0; i < whole; i += BLOCK) {
                const Block k = read(key + i);
                for (int g = 0; g < G; g++) {
                    const Block a = read(q + g * d + i);
                    sum[g] += a.even * k.even;
                    sum[g] += a.odd * k.odd;
                }
            }
            if (whole < d) {
                const Block k = read_some(key + whole, d - whole);
                for (int g = 0; g < G; g++) {
                    const Block a = read_some(q + g * d + whole, d - whole);
                    sum[g] += a.even * k.even + a.odd * k.odd;
                }
            }
            for (int g = 0; g < G; g++) sums[g][lane] = sum[g];
        }
        for (int g = 0; g < G; g++) {
            const Vector all = totals(sums[g]) * scale;
            std::memcpy(scores + g * CHUNK + first, &all, sizeof all);
        }
    }
}

// out[g] = the sum of weights[g * CHUNK + t] values[t], by BLOCKS blocks of the head at a time.
template <int BLOCKS, int G, class T>
void mix_blocks(const float* weights, const T* values, int64_t d, int64_t at, int64_t count, float* out) {
    Block sum[G][BLOCKS] = {};
    for (int64_t t = 0; t < count; t++) {
        const T* value = values + t * d + at;
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) {
            const Block v = read(value + b * BLOCK);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                const float w = weights[g * CHUNK + t];
                sum[g][b].even += w * v.even;
                sum[g][b].odd += w * v.odd;
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int b = 0; b < BLOCKS; b++)
            for (int lane = 0; lane < LANES; lane++) {
                float* to = out + g * d + at + b * BLOCK;
                to[place(values, lane, false)] = sum[g][b].even[lane];
                to[place(values, lane, true)] = sum[g][b].odd[lane];
            }
}

template <int G, class T>
void mix(const float* weights, const T* values, int64_t d, int64_t count, float* out) {
    constexpr int WIDE = G == 1 ? 4 : 2;
    int64_t at = 0;
    for (; at + WIDE * BLOCK <= d; at += WIDE * BLOCK) mix_blocks<WIDE, G>(weights, values, d, at, count, out);
    for (; at + BLOCK <= d; at += BLOCK) mix_blocks<1, G>(weights, values, d, at, count, out);
    for (; at < d; at++)
        for (int g = 0; g < G; g++) {
            float sum = 0;
            for (int64_t t = 0; t < count; t++) sum += weights[g * CHUNK + t] * float(values[t * d + at]);
            out[g * d + at] = sum;
        }
}

template <int G, class T>
void attend(const T* q, const T* keys, const T* values, int64_t d, int64_t count, float scale, float* out, Part* parts) {
    alignas(64) float scores[G * CHUNK];  // up to the next whole vector, `score` writes them all
    if (d == 64) score<64, G>(q, keys, d, count, scale, scores);
    else if (d == 128) score<128, G>(q, keys, d, count, scale, scores);
    else score<0, G>(q, keys, d, count, scale, scores);
    for (int g = 0; g < G; g++) {
        float *own = scores + g * CHUNK, most = own[0], sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < count; t++) most = std::max(most, own[t]);
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < count; t++) sum += own[t] = exponential(own[t] - most);
        parts[g] = {most, sum};
    }
    mix<G>(scores, values, d, count, out);
}

// q (group, d) of one key head; out (group, d).
template <class T>
void attend_group(const T* q, const T* keys, const T* values, int64_t group, int64_t d, int64_t count, float scale,
                  float* out, Part* parts) {
    int64_t g = 0;
    for (; g + GROUP <= group; g += GROUP) attend<GROUP>(q + g * d, keys, values, d, count, scale, out + g * d, parts + g);
    for (; g + 2 <= group; g += 2) attend<2>(q + g * d, keys, values, d, count, scale, out + g * d, parts + g);
    for (; g < group; g++) attend<1>(q + g * d, keys, values, d, count, scale, out + g * d, parts + g);
}

struct Task {
    int64_t row, head, chunk;  // head: of the keys
};

// What the rows of a step attend to, the same in every layer.
struct Tasks {
    std::vector<Task> all;
    std::vector<int64_t> first;  // each row's first task

    Tasks(const int64_t* places, const Shape& s) {
        for (int64_t r = 0; r < s.rows; r++) {
            first.push_back(all.size());
            for (int64_t h = 0; h < s.kv_heads; h++)
                for (int64_t c = 0; c * CHUNK <= places[r]; c++) all.push_back({r, h, c});
        }
    }
};

// Sums of the tasks: each (group, size), and how they were scaled, each (group).
struct Sums {
    std::vector<float> mixed;
    std::vector<Part> parts;

    Sums(const Tasks& tasks, const Shape& s)
        : mixed(tasks.all.size() * (s.heads / s.kv_heads) * s.size), parts(tasks.all.size() * (s.heads / s.kv_heads)) {}
};

// By all threads of a parallel region together.
template <class T>
void attend_rows(T* qkv, const float* cosines, const float* sines, T* cache, const int64_t* places, T* out,
                 const Shape& s, const Tasks& tasks, Sums& sums) {
    const int64_t d = s.size, group = s.heads / s.kv_heads, row_size = (s.heads + 2 * s.kv_heads) * d;
    const int64_t count = tasks.all.size();
    float* mixed = sums.mixed.data();
    Part* known = sums.parts.data();
    const float scale = 1.0f / std::sqrt(float(d));
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t h = 0; h < s.kv_heads; h++) {
            T *row = qkv + r * row_size, *k = row + (s.heads + h) * d, *v = k + s.kv_heads * d;
            for (int64_t g = 0; g < group; g++)
                turn(row + (h * group + g) * d, cosines + r * d / 2, sines + r * d / 2, d / 2);
            turn(k, cosines + r * d / 2, sines + r * d / 2, d / 2);
            T* own = cache + r * s.row_step + h * s.head_step + places[r] * d;
            std::memcpy(own, k, d * sizeof(T));
            std::memcpy(own + s.kv_heads * s.head_step, v, d * sizeof(T));
        }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        const Task& t = tasks.all[i];
        const T* keys = cache + t.row * s.row_step + t.head * s.head_step + t.chunk * CHUNK * d;
        attend_group(qkv + t.row * row_size + t.head * group * d, keys, keys + s.kv_heads * s.head_step, group, d,
                     std::min(CHUNK, places[t.row] + 1 - t.chunk * CHUNK), scale, mixed + i * group * d,
                     known + i * group);
    }
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t h = 0; h < s.heads; h++) {
            const int64_t chunks = places[r] / CHUNK + 1, g = h % group;
            const int64_t at = tasks.first[r] + h / group * chunks;  // its first chunk's task
            float most = known[at * group + g].most, sum = 0;
            for (int64_t c = 1; c < chunks; c++) most = std::max(most, known[(at + c) * group + g].most);
            float* total = mixed + (at * group + g) * d;
            for (int64_t c = 0; c < chunks; c++) {
                const Part& part = known[(at + c) * group + g];
                const float by = exponential(part.most - most);
                const float* own = total + c * group * d;
                sum += by * part.sum;
                for (int64_t i = 0; i < d; i++) total[i] = c ? total[i] + by * own[i] : by * own[i];
            }
            for (int64_t i = 0; i < d; i++) store(out + (r * s.heads + h) * d + i, total[i] / sum);
        }
}

}  // namespace
