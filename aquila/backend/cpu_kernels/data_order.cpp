// The data order's long loops: shuffling as NumPy's RandomState does, and a blend that goes on from any place.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int WORDS = 624, MIDDLE = 397;
constexpr int AHEAD = 64;  // places that are fetched from memory before they are swapped

// Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), as numpy.random.RandomState's state has it.
struct Twister {
    uint32_t* key;
    int64_t place;

    uint32_t next() {
        if (place == WORDS) refill();
        uint32_t y = key[place++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }

    void refill() {
        const auto twist = [](uint32_t high, uint32_t low) {
            const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
            return (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0u);
        };
        for (int i = 0; i < WORDS; i++)
            key[i] = key[(i + MIDDLE) % WORDS] ^ twist(key[i], key[(i + 1) % WORDS]);
        place = 0;
    }

    // A number of 0..most, each as likely: bits up to the highest of `most`, drawn anew while they are above it.
    uint32_t upto(uint32_t most) {
        uint32_t mask = most;
        for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
        uint32_t value;
        while ((value = next() & mask) > most) {
        }
        return value;
    }
};

}  // namespace

// x (count) in the order in which numpy.random.RandomState.shuffle leaves it; key (624) and place are its state, and
// go on. Fisher and Yates swap the last with a random one, then the last but one, ...: places drawn a few ahead are
// fetched together, where one by one each would wait for memory.
extern "C" void shuffle(uint32_t* x, int64_t count, uint32_t* key, int64_t* place) {
    Twister twister{key, *place};
    uint32_t drawn[AHEAD];
    for (int64_t last = count - 1; last > 0;) {
        const int64_t some = std::min<int64_t>(AHEAD, last);
        for (int64_t i = 0; i < some; i++) {
            drawn[i] = twister.upto(uint32_t(last - i));
            __builtin_prefetch(x + drawn[i], 1);
        }
        for (int64_t i = 0; i < some; i++) std::swap(x[last - i], x[drawn[i]]);
        last -= some;
    }
    *place = twister.place;
}

// starts (samples, 2): where sample i, which begins at token i * seq_length of the documents laid end to end in their
// order, begins: the document's place in the order, and the token in it. Returns the tokens of all documents, or -1
// where one has less than none.
extern "C" int64_t sample_starts(const char* lengths, const int32_t* documents, int64_t count, int64_t seq_length,
                                 int32_t* starts, int64_t samples) {
    int64_t begin = 0, sample = 0, next = 0;
    for (int64_t at = 0; at < count; at++) {
        if (at + AHEAD < count) __builtin_prefetch(lengths + 4 * int64_t(documents[at + AHEAD]));
        int32_t length;  // lengths lie in a mapped `.idx` file behind a header of 34 bytes: at odd addresses
        std::memcpy(&length, lengths + 4 * int64_t(documents[at]), sizeof length);
        if (length < 0) return -1;
        for (; sample < samples && next < begin + length; sample++, next += seq_length) {
            starts[2 * sample] = int32_t(at);
            starts[2 * sample + 1] = int32_t(next - begin);
        }
        begin += length;
    }
    return begin;
}

// A product and a difference, each rounded: joined into one operation, as some processors would, they choose otherwise.
#if defined(__clang__)
#pragma clang fp contract(off)
#define UNJOINED
#else
#define UNJOINED __attribute__((optimize("fp-contract=off")))
#endif

// which (samples): the corpora of samples first, first + 1, ..., each time the one that has given the least of its
// share; counts (corpora): what each had given before `first`, and goes on. Sample k's shares are of max(k, 1).
extern "C" UNJOINED void blend(const double* weights, int64_t corpora, int64_t* counts, int64_t first, int64_t samples,
                      int16_t* which) {
    for (int64_t at = 0; at < samples; at++) {
        const double k = std::max<double>(double(first + at), 1.0);
        int64_t best = 0;
        double most = weights[0] * k - double(counts[0]);
        for (int64_t c = 1; c < corpora; c++) {
            const double error = weights[c] * k - double(counts[c]);
            if (error > most) most = error, best = c;
        }
        which[at] = int16_t(best);
        counts[best]++;
    }
}
