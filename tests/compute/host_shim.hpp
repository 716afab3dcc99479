// What kernels.cu takes from CUDA, for a host compiler: qualifiers, intrinsics, vectors, and a grid as nested loops.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline

struct Place {
    unsigned x, y, z;
};
static Place blockIdx, threadIdx, blockDim, gridDim;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static bool misaligned;  // a device would stop where the host writes all the same
template <typename T>
static inline void __stwb(T* place, T value) {
    misaligned |= reinterpret_cast<std::uintptr_t>(place) % sizeof(T) != 0;
    std::memcpy(static_cast<void*>(place), &value, sizeof(T));
}
static inline int __popc(unsigned word) { return __builtin_popcount(word); }
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Run a kernel for every thread of a grid, last to first: their order must not matter.
//
// `arguments` point to its arguments, whose `sizes` in bytes must be those that the kernel declares.
// Returns 1 if they are not, 2 after a misaligned write.
template <typename... Types, std::size_t... Number>
int run_grid(
    void (*kernel)(Types...), const unsigned* grid, const unsigned* block, void** arguments, const unsigned* sizes,
    unsigned count, std::index_sequence<Number...>) {
    if (count != sizeof...(Types) || !((sizes[Number] == sizeof(Types)) && ...)) return 1;
    misaligned = false;
    gridDim = {grid[0], grid[1], 1};
    blockDim = {block[0], block[1], 1};
    for (unsigned b = grid[0] * grid[1]; b-- > 0;)
        for (unsigned t = block[0] * block[1]; t-- > 0;) {
            blockIdx = {b % grid[0], b / grid[0], 0};
            threadIdx = {t % block[0], t / block[0], 0};
            kernel(*static_cast<Types*>(arguments[Number])...);
        }
    return misaligned ? 2 : 0;
}

template <typename... Types>
int run_kernel(
    void (*kernel)(Types...), const unsigned* grid, const unsigned* block, void** arguments, const unsigned* sizes,
    unsigned count) {
    return run_grid(kernel, grid, block, arguments, sizes, count, std::index_sequence_for<Types...>{});
}

#define EXPORT(name)                                                                                               \
    extern "C" int run_##name(                                                                                     \
        const unsigned* grid, const unsigned* block, void** arguments, const unsigned* sizes, unsigned count) {    \
        return run_kernel(name, grid, block, arguments, sizes, count);                                             \
    }
