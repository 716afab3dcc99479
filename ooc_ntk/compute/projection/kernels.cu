// Entries of R and products with it on CUDA devices: the same bits as entries.py (DESIGN: projection).
//
// Compiled at run time, so nothing is included. Nothing is added atomically and every sum has one order, whatever the
// grid: two runs give the same bits. Indices are 64-bit. Tests compile this text for the host as well.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short bf16;  // the bits of a bfloat16

// What the words are for, the last word of a counter: as in entries.py.
#define SIGNS 0u
#define SJLT 1u
#define GAUSSIAN 2u
#define SHIFTS 3u
#define SHIFT_SIGNS 4u
#define FACTORS 5u

// Neighbouring threads that make the same 128 signs and write 8 columns of every 32 each, so that together they write
// whole sectors of memory; generating four times is cheaper than writing apart (guessed: no device was at hand).
#define SHARE 4

// Rows of values that one thread of a shifted product sums, for which it reads places and signs once (guessed).
#define ROWS 4

struct Words {
    u32 x, y, z, w;
};

// Philox4x32-10 (Salmon et al. 2011).
static __device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 first = (u64)0xD2511F53u * c0, second = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(second >> 32) ^ c1 ^ k0;
        c1 = (u32)second;
        c2 = (u32)(first >> 32) ^ c3 ^ k1;
        c3 = (u32)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Words words = {c0, c1, c2, c3};
    return words;
}

static __device__ __forceinline__ u32 low(i64 number) { return (u32)(u64)number; }
static __device__ __forceinline__ u32 high(i64 number) { return (u32)((u64)number >> 32); }

// Where a thread starts and how far it goes, along x and y.
static __device__ __forceinline__ i64 first_x() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ __forceinline__ i64 first_y() { return (i64)blockIdx.y * blockDim.y + threadIdx.y; }
static __device__ __forceinline__ i64 step_x() { return (i64)gridDim.x * blockDim.x; }
static __device__ __forceinline__ i64 step_y() { return (i64)gridDim.y * blockDim.y; }

// A row below `block` and a sign, as tables hold them.
static __device__ __forceinline__ u32 row_and_sign(Words words, u32 block) {
    return (u32)((u64)words.x * block >> 32) << 1 | (words.y & 1u);
}

// How far a block of parameters is shifted in one block of rows.
static __device__ __forceinline__ u32 shift_of(i64 number, u32 nonzero, u32 block, u32 k0, u32 k1) {
    return (u32)((u64)philox(low(number), high(number), nonzero, SHIFTS, k0, k1).x * block >> 32);
}

// One bit per block of rows.
static __device__ __forceinline__ u32 shift_signs_of(i64 p, u32 k0, u32 k1) {
    return philox(low(p), high(p), 0u, SHIFT_SIGNS, k0, k1).x;
}

static __device__ __forceinline__ u32 factor_of(i64 start, u32 side, i64 index, u32 nonzero, u32 block, u32 k0, u32 k1) {
    return row_and_sign(philox((u32)index, low(start), 2u * nonzero + side, FACTORS + (high(start) << 8), k0, k1), block);
}

// (n, 4) words of (n, 4) counters: for known answers.
extern "C" __global__ void philox_words(const u32* counters, i64 n, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x()) {
        const u32* c = counters + 4 * i;
        Words words = philox(c[0], c[1], c[2], c[3], k0, k1);
        out[4 * i] = words.x;
        out[4 * i + 1] = words.y;
        out[4 * i + 2] = words.z;
        out[4 * i + 3] = words.w;
    }
}

// Tables (count, n) of parameters p (n): twice the row within the block, plus 1 for a minus.
extern "C" __global__ void sjlt_table(const i64* p, i64 n, u32 count, u32 block, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x())
        for (u32 j = 0; j < count; ++j)
            out[j * n + i] = row_and_sign(philox(low(p[i]), high(p[i]), j, SJLT, k0, k1), block);
}

extern "C" __global__ void shift_table(const i64* p, i64 n, u32 count, u32 block, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x()) {
        i64 number = p[i] / block;
        u32 inside = (u32)(p[i] - number * block), signs = shift_signs_of(p[i], k0, k1);
        for (u32 j = 0; j < count; ++j) {
            u32 row = inside + shift_of(number, j, block, k0, k1);
            out[j * n + i] = (row < block ? row : row - block) << 1 | (signs >> j & 1u);
        }
    }
}

// One side (0 outputs, 1 inputs) of the weight that begins at `start`, for some of its outputs or inputs.
extern "C" __global__ void factor_table(
    const i64* index, i64 n, i64 start, u32 side, u32 count, u32 block, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x())
        for (u32 j = 0; j < count; ++j) out[j * n + i] = factor_of(start, side, index[i], j, block, k0, k1);
}

// Overwrite the part of a table whose parameters belong to that weight: sums of the rows of both sides.
extern "C" __global__ void outer_table(
    const i64* p, i64 n, i64 start, i64 outputs, i64 inputs, u32 count, u32 block, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x()) {
        i64 there = p[i] - start;
        if (there < 0 || there >= outputs * inputs) continue;
        i64 output = there / inputs, input = there - output * inputs;
        for (u32 j = 0; j < count; ++j) {
            u32 left = factor_of(start, 0u, output, j, block, k0, k1);
            u32 right = factor_of(start, 1u, input, j, block, k0, k1);
            u32 row = (left >> 1) + (right >> 1);
            out[j * n + i] = (row < block ? row : row - block) << 1 | ((left ^ right) & 1u);
        }
    }
}

// Signs as they lie in memory, a word at a time: a set bit is a minus. The last argument only tells the type.
static __device__ __forceinline__ u32 sign_word(u32 bits, const float*) { return 0x3F800000u | bits << 31; }
static __device__ __forceinline__ u32 sign_word(u32 bits, const bf16*) {
    return 0x3F803F80u | (bits & 1u) << 15 | (bits & 2u) << 30;
}

static __device__ __forceinline__ void write_sign(u32 bit, float* out) { *out = bit & 1u ? -1.0f : 1.0f; }
static __device__ __forceinline__ void write_sign(u32 bit, bf16* out) { *out = bit & 1u ? 0xBF80 : 0x3F80; }

// 16 bytes of them, the most that one thread writes at once.
template <typename T>
static __device__ __forceinline__ uint4 sign_words(u32 bits, const T* type) {
    const int each = 4 / sizeof(T);
    return make_uint4(
        sign_word(bits, type), sign_word(bits >> each, type), sign_word(bits >> 2 * each, type),
        sign_word(bits >> 3 * each, type));
}

// Bits set in a word less 16, which bfloat16 holds exactly: the upper half of its float.
static __device__ __forceinline__ u32 number_bits(u32 word) { return __float_as_uint((float)((int)__popc(word) - 16)); }

static __device__ __forceinline__ bool aligned(const void* place, u32 bytes) { return ((u64)place & (bytes - 1)) == 0; }

// Write up to 8 signs: by a call, as the compiler takes an assignment apart into words (seen in nvcc 13.0's output).
template <typename T>
static __device__ __forceinline__ void write_signs(u32 bits, i64 columns, T* out) {
    if (columns >= 8 && aligned(out, 16)) {
        uint4* there = reinterpret_cast<uint4*>(out);
        __stwb(there, sign_words(bits, out));
        if (sizeof(T) == 4) __stwb(there + 1, sign_words(bits >> 4, out));
        return;
    }
    for (int column = 0; column < 8 && column < columns; ++column) write_sign(bits >> column, out + column);
}

// Write up to 4 numbers.
static __device__ __forceinline__ void write_numbers(Words words, i64 columns, float* out) {
    uint4 made = make_uint4(number_bits(words.x), number_bits(words.y), number_bits(words.z), number_bits(words.w));
    if (columns >= 4 && aligned(out, 16)) {
        __stwb(reinterpret_cast<uint4*>(out), made);
        return;
    }
    out[0] = __uint_as_float(made.x);
    if (columns > 1) out[1] = __uint_as_float(made.y);
    if (columns > 2) out[2] = __uint_as_float(made.z);
    if (columns > 3) out[3] = __uint_as_float(made.w);
}
static __device__ __forceinline__ void write_numbers(Words words, i64 columns, bf16* out) {
    u32 x = number_bits(words.x) >> 16, y = number_bits(words.y) >> 16;
    u32 z = number_bits(words.z) >> 16, w = number_bits(words.w) >> 16;
    if (columns >= 4 && aligned(out, 8)) {
        __stwb(reinterpret_cast<uint2*>(out), make_uint2(x | y << 16, z | w << 16));
        return;
    }
    out[0] = (bf16)x;
    if (columns > 1) out[1] = (bf16)y;
    if (columns > 2) out[2] = (bf16)z;
    if (columns > 3) out[3] = (bf16)w;
}

// Signs (n, dim), rows next to each other: x goes over columns, y over parameters.
template <typename T>
static __device__ __forceinline__ void sign_tile(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, T* out) {
    i64 threads = (dim + 127) / 128 * SHARE;
    for (i64 i = first_y(); i < n; i += step_y())
        for (i64 thread = first_x(); thread < threads; thread += step_x()) {
            i64 group = thread / SHARE;
            int byte = (int)(thread % SHARE) * 8;
            Words words = philox(low(p[i]), high(p[i]), (u32)group, SIGNS, k0, k1);
            i64 column = group * 128 + byte;
            T* row = out + i * dim + column;
            if (column < dim) write_signs(words.x >> byte, dim - column, row);
            if (column + 32 < dim) write_signs(words.y >> byte, dim - column - 32, row + 32);
            if (column + 64 < dim) write_signs(words.z >> byte, dim - column - 64, row + 64);
            if (column + 96 < dim) write_signs(words.w >> byte, dim - column - 96, row + 96);
        }
}

extern "C" __global__ void sign_tile_f32(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, float* out) {
    sign_tile(p, n, dim, k0, k1, out);
}
extern "C" __global__ void sign_tile_bf16(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, bf16* out) {
    sign_tile(p, n, dim, k0, k1, out);
}

// Bits set in a word less 16 (n, dim), likewise: four columns a thread.
template <typename T>
static __device__ __forceinline__ void gaussian_tile(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, T* out) {
    i64 groups = (dim + 3) / 4;
    for (i64 i = first_y(); i < n; i += step_y())
        for (i64 group = first_x(); group < groups; group += step_x()) {
            Words words = philox(low(p[i]), high(p[i]), (u32)group, GAUSSIAN, k0, k1);
            write_numbers(words, dim - group * 4, out + i * dim + group * 4);
        }
}

extern "C" __global__ void gaussian_tile_f32(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, float* out) {
    gaussian_tile(p, n, dim, k0, k1, out);
}
extern "C" __global__ void gaussian_tile_bf16(const i64* p, i64 n, i64 dim, u32 k0, u32 k1, bf16* out) {
    gaussian_tile(p, n, dim, k0, k1, out);
}

// values times the part of R that a sorted table describes, added to total (rows, count · block).
//
// `places` (count, n) holds twice the number of a parameter, plus 1 for a minus, sorted by the row of R that it goes to;
// `starts` (count, block + 1) where the parameters of each row begin. One thread sums one entry of the total in that
// order: x goes over rows of values, y over rows of R.
template <typename T>
static __device__ __forceinline__ void scatter_sorted(
    const T* values, i64 row_stride, i64 column_stride, i64 rows, i64 n, const u32* places, const u32* starts,
    u32 count, u32 block, double* total, i64 total_stride) {
    for (i64 cell = first_y(); cell < (i64)count * block; cell += step_y()) {
        u32 j = (u32)cell / block;
        const u32* here = places + j * n;
        u32 start = starts[cell + j], stop = starts[cell + j + 1];
        for (i64 row = first_x(); row < rows; row += step_x()) {
            const T* mine = values + row * row_stride;
            T sum = 0;
#pragma unroll 4
            for (u32 i = start; i < stop; ++i) {
                u32 place = here[i];
                T value = mine[(i64)(place >> 1) * column_stride];
                sum += place & 1u ? -value : value;
            }
            total[row * total_stride + cell] += (double)sum;
        }
    }
}

extern "C" __global__ void scatter_sorted_f32(
    const float* values, i64 row_stride, i64 column_stride, i64 rows, i64 n, const u32* places, const u32* starts,
    u32 count, u32 block, double* total, i64 total_stride) {
    scatter_sorted(values, row_stride, column_stride, rows, n, places, starts, count, block, total, total_stride);
}
extern "C" __global__ void scatter_sorted_f64(
    const double* values, i64 row_stride, i64 column_stride, i64 rows, i64 n, const u32* places, const u32* starts,
    u32 count, u32 block, double* total, i64 total_stride) {
    scatter_sorted(values, row_stride, column_stride, rows, n, places, starts, count, block, total, total_stride);
}

// What a shifted product needs of R: shifts (count, blocks) of blocks of parameters from `number` on ...
extern "C" __global__ void shift_places(i64 number, i64 blocks, u32 count, u32 block, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < blocks; i += step_x())
        for (u32 j = 0; j < count; ++j) out[j * blocks + i] = shift_of(number + i, j, block, k0, k1);
}

// ... and sign bits (n) of parameters from `start` on.
extern "C" __global__ void shift_signs(i64 start, i64 n, u32 k0, u32 k1, u32* out) {
    for (i64 i = first_x(); i < n; i += step_x()) out[i] = shift_signs_of(start + i, k0, k1);
}

// values (rows, n) of consecutive parameters times their part of a block-shift R, added to total (rows, count · block).
//
// One thread gathers ROWS entries of one column of the total over all blocks of parameters, in order: x goes over those
// columns, so that neighbours read neighbouring values, y over groups of rows.
template <typename T>
static __device__ __forceinline__ void shift_multiply(
    const T* values, i64 row_stride, i64 rows, i64 start, i64 n, const u32* shifts, const u32* signs, u32 count,
    u32 block, double* total, i64 total_stride) {
    i64 number = start / block, blocks = (start + n - 1) / block - number + 1;
    i64 before = number * block - start;  // where the first block begins, counted from `start`
    for (i64 group = first_y(); group * ROWS < rows; group += step_y())
        for (i64 cell = first_x(); cell < (i64)count * block; cell += step_x()) {
            u32 j = (u32)cell / block, row_here = (u32)cell - j * block;
            const T* mine = values + group * ROWS * row_stride;
            const u32* shift = shifts + j * blocks;
            i64 left = rows - group * ROWS;
            T sums[ROWS] = {};
            for (i64 b = 0; b < blocks; ++b) {
                u32 inside = row_here >= shift[b] ? row_here - shift[b] : row_here + block - shift[b];
                i64 i = before + b * block + inside;
                if (i < 0 || i >= n) continue;
                T sign = signs[i] >> j & 1u ? (T)-1 : (T)1;
#pragma unroll
                for (int row = 0; row < ROWS; ++row)
                    if (row < left) sums[row] += sign * mine[row * row_stride + i];
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                if (row < left) total[(group * ROWS + row) * total_stride + cell] += (double)sums[row];
        }
}

extern "C" __global__ void shift_multiply_f32(
    const float* values, i64 row_stride, i64 rows, i64 start, i64 n, const u32* shifts, const u32* signs, u32 count,
    u32 block, double* total, i64 total_stride) {
    shift_multiply(values, row_stride, rows, start, n, shifts, signs, count, block, total, total_stride);
}
extern "C" __global__ void shift_multiply_f64(
    const double* values, i64 row_stride, i64 rows, i64 start, i64 n, const u32* shifts, const u32* signs, u32 count,
    u32 block, double* total, i64 total_stride) {
    shift_multiply(values, row_stride, rows, start, n, shifts, signs, count, block, total, total_stride);
}
