// Rounding a merged weight to the dtype of its file, and what merging reports of it, in one pass (rwkv_bone/merging/merge.py).
//
// Of the entries' values before, exact and rounded: the sums of the squares of before, of exact - before and of rounded - exact; how
// many have exact != before, and for how many of those rounded is what before would be rounded to. One thread does all of it:
// what makes the exact values takes several times as long.
//
// Compiled once for every instruction set with ROUNDING_VARIANT defined, which gives the kernel, and once without, for the plain C
// interface.
#include "cpu.h"

namespace rounding {

constexpr int kFloat16 = 3;  // beside cpu::Type

struct Problem {
    int before_type, rounded_type;
    int64_t n;
    const void* before;
    const float* exact;
    void* rounded;
    double* squares;  // 3, which are overwritten
    int64_t* counts;  // 2, likewise
};

using Kernel = void(const Problem&);

namespace portable { Kernel effect; }
namespace avx2 { Kernel effect; }
namespace avx512 { Kernel effect; }

}  // namespace rounding

#ifdef ROUNDING_VARIANT
#include "vectors.h"

namespace rounding {
namespace ROUNDING_VARIANT {
namespace {

using namespace vectors;
using V = Vec<float>;
constexpr int W = Lanes<float>::W;
constexpr int64_t kBlock = 64 * W;  // entries whose squares are summed in float

INLINE Bits either(Int which, Bits yes, Bits no) { return ((Bits)which & yes) | (~(Bits)which & no); }

// A type of numbers in memory: what each number's bits are, and back. Rounding is to the nearest, of two the even one; what is too
// large becomes infinity, and a NaN stays one.
struct Single {
    using Stored = Bits;
    static INLINE Bits bits(V x) { return (Bits)x; }
    static INLINE V value(Bits x) { return (V)x; }
};

struct Brain {  // bf16
    using Stored = Half;
    static INLINE Bits bits(V v) {
        Bits x = (Bits)v;
        return either((Int)(v != v), x | 0x400000, x + 0x7fff + ((x >> 16) & 1)) >> 16;
    }
    static INLINE V value(Bits x) { return (V)(x << 16); }
};

struct Short {  // fp16
    using Stored = Half;
    static INLINE Bits bits(V v) {
        Bits x = (Bits)v, sign = x & 0x80000000u, size = x ^ sign;
        Bits normal = (size - ((127 - 15) << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        Bits small = (Bits)((V)size + 0.5f) - (126u << 23);  // 0.5 rounds it to a multiple of 2^-24, the least subnormal
        Bits special = either((Int)(size > (255u << 23)), Bits{} + 0x7e00, Bits{} + 0x7c00);
        Bits finite = either((Int)(size < (113u << 23)), small, normal);
        return either((Int)(size >= (143u << 23)), special, finite) | (sign >> 16);
    }
    static INLINE V value(Bits x) {
        Bits sign = (x & 0x8000) << 16, size = (x & 0x7fff) << 13, normal = size + ((127 - 15) << 23);
        V small = (V)(size + (113 << 23)) - 0x1p-14f;  // subnormal: its bits below an exponent that is taken off again
        Bits finite = either((Int)(size < (1u << 23)), (Bits)small, normal);
        return (V)(sign | either((Int)(size >= (31u << 23)), normal + ((128 - 16) << 23), finite));
    }
};

template <class T> constexpr int64_t kSize = int64_t(sizeof(typename T::Stored)) / W;

template <class T> INLINE V read(const void* from, int64_t i) {
    typename T::Stored x;
    memcpy(&x, static_cast<const char*>(from) + i * kSize<T>, sizeof x);
    return T::value(__builtin_convertvector(x, Bits));
}

template <class T> INLINE void write(void* to, int64_t i, Bits bits) {
    typename T::Stored x = __builtin_convertvector(bits, typename T::Stored);
    memcpy(static_cast<char*>(to) + i * kSize<T>, &x, sizeof x);
}

INLINE void add_squares(Vec<double>& sum, V x) {
    typedef float HalfV __attribute__((vector_size(kBytes / 2)));
    HalfV halves[2];
    memcpy(halves, &x, sizeof x);
    UNROLL for (int i = 0; i < 2; i++) {
        Vec<double> y = __builtin_convertvector(halves[i], Vec<double>);
        sum += y * y;
    }
}

// Whether a sum of squares in float says what it should: nothing became infinite, or too small to count.
INLINE bool sound(double sum, bool zero_expected) { return (sum > 1e-30 && sum < 1e38) || (sum == 0 && zero_expected); }

// n entries, a multiple of W.
template <class Before, class Rounded>
void block(const void* before, const void* exact, void* rounded, int64_t n, double* squares, int64_t* counts) {
    V weight{}, update{}, lost{};
    Int moved{}, vanished{};
    for (int64_t i = 0; i < n; i += W) {
        V b = read<Before>(before, i), e = read<Single>(exact, i);
        Bits bits = Rounded::bits(e);
        write<Rounded>(rounded, i, bits);
        V r = Rounded::value(bits), u = e - b, l = r - e;
        V same = std::is_same<Before, Rounded>::value ? b : Rounded::value(Rounded::bits(b));
        weight += b * b, update += u * u, lost += l * l;
        Int moves = (Int)(e != b);
        moved -= moves, vanished -= moves & (Int)(r == same);
    }
    double sums[3] = {};
    int64_t moves = 0;
    for (int l = 0; l < W; l++) {
        sums[0] += weight[l], sums[1] += update[l], sums[2] += lost[l];
        moves += moved[l], counts[1] += vanished[l];
    }
    counts[0] += moves;
    if (!sound(sums[0], !moves) || !sound(sums[1], !moves) || !sound(sums[2], !moves || std::is_same<Rounded, Single>::value)) {
        Vec<double> exactly[3] = {};
        for (int64_t i = 0; i < n; i += W) {
            V b = read<Before>(before, i), e = read<Single>(exact, i);
            add_squares(exactly[0], b), add_squares(exactly[1], e - b), add_squares(exactly[2], read<Rounded>(rounded, i) - e);
        }
        for (int k = 0; k < 3; k++) {
            sums[k] = 0;
            for (int l = 0; l < Lanes<double>::W; l++) sums[k] += exactly[k][l];
        }
    }
    for (int k = 0; k < 3; k++) squares[k] += sums[k];
}

template <class Before, class Rounded>
void effect_of(const Problem& p) {
    for (int k = 0; k < 3; k++) p.squares[k] = 0;
    for (int k = 0; k < 2; k++) p.counts[k] = 0;
    const char* before = static_cast<const char*>(p.before);
    const char* exact = reinterpret_cast<const char*>(p.exact);
    char* rounded = static_cast<char*>(p.rounded);
    const int64_t whole = p.n / W * W, rest = p.n - whole;
    for (int64_t i = 0; i < whole; i += kBlock)
        block<Before, Rounded>(before + i * kSize<Before>, exact + i * kSize<Single>, rounded + i * kSize<Rounded>,
                               least(kBlock, whole - i), p.squares, p.counts);
    if (!rest) return;
    typename Before::Stored b{};  // filled up with zeros, which change nothing
    V e{};
    typename Rounded::Stored r;
    memcpy(&b, before + whole * kSize<Before>, size_t(rest * kSize<Before>));
    memcpy(&e, exact + whole * kSize<Single>, size_t(rest * kSize<Single>));
    block<Before, Rounded>(&b, &e, &r, W, p.squares, p.counts);
    memcpy(rounded + whole * kSize<Rounded>, &r, size_t(rest * kSize<Rounded>));
}

template <class Call> INLINE void as_type(int type, const Call& call) {
    if (type == kFloat16) call(Short());
    else if (type == cpu::kBFloat16) call(Brain());
    else call(Single());
}

}  // namespace

void effect(const Problem& p) {
    as_type(p.before_type, [&](auto before) {
        as_type(p.rounded_type, [&](auto rounded) { effect_of<decltype(before), decltype(rounded)>(p); });
    });
}

}  // namespace ROUNDING_VARIANT
}  // namespace rounding
#else

// `variant` is one that cpu_has. The types: float32, bf16 or fp16.
extern "C" void rounding_cpu_effect(int variant, int, void*, int before_type, int rounded_type, int64_t n, const void* before,
                                    const void* exact, void* rounded, void* squares, void* counts) {
    using namespace rounding;
    Kernel* kernel = portable::effect;
#if defined(__x86_64__)
    if (variant == cpu::kAvx512) kernel = avx512::effect;
    if (variant == cpu::kAvx2) kernel = avx2::effect;
#endif
    kernel({before_type, rounded_type, n, before, static_cast<const float*>(exact), rounded, static_cast<double*>(squares),
            static_cast<int64_t*>(counts)});
}
#endif
