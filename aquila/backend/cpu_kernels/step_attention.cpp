// Attention of each row's newest token over that row's cache (`step_attention.h`), as one call.

#include "step_attention.h"

namespace {

template <class T>
void step_attention(T* qkv, const float* cosines, const float* sines, T* cache, const int64_t* places, T* out,
                    const Shape& s, int threads) {
    const Tasks tasks(places, s);
    Sums sums(tasks, s);
#pragma omp parallel num_threads(threads)
    attend_rows(qkv, cosines, sines, cache, places, out, s, tasks, sums);
}

}  // namespace

// qkv (rows, heads + 2 kv_heads, size): turned in place. cosines, sines (rows, size / 2). cache: keys of kv_heads
// heads, then values, each (places, size). places (rows): where the new token stands. out (rows, heads, size).
#define EXPORT(T, NAME)                                                                                              \
    extern "C" void step_attention_##NAME(void* qkv, const float* c, const float* s, void* cache,                    \
                                          const int64_t* places, void* out, int64_t rows, int64_t heads,             \
                                          int64_t kv_heads, int64_t size, int64_t row_step, int64_t head_step,       \
                                          int threads) {                                                             \
        step_attention((T*)qkv, c, s, (T*)cache, places, (T*)out, {rows, heads, kv_heads, size, row_step, head_step}, \
                       threads);                                                                                     \
    }

EXPORT(bf16, bf16)
EXPORT(float, fp32)
