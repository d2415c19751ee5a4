// Moves blocks between the fragments of a KV cache and memory in which a block lies in one piece: an arena in host memory,
// or a staging buffer on the device. One grid, held to few CTAs, walks over all slices of all blocks.
//
// `make ptx` compiles this to gather_scatter.ptx. Launch and Slice are mirrored in kernel.rs and plan.rs.

typedef unsigned int u32;
typedef unsigned long long u64;

#define ENTRIES 500
#define PLACE_BYTES 4096

// At most 32 KiB of a fragment.
struct Slice {
    u64 device;  // address in block 0
    u64 stride;  // from block to block
    u64 at;      // first byte within the block, when its fragments lie one after the other
    u64 bytes;   // a multiple of 16
};

struct Entry {
    u32 block;
    u32 place;
};

struct Launch {
    const Slice *slices;
    u64 other;  // where place 0 has its first byte, or where the staging buffer starts
    u64 step;   // staging: bytes from block to block; 0: the entry's place counts
    u64 from;   // what the first byte at `other` is within its block
    u32 first_slice;
    u32 slice_count;
    u32 blocks;
    u32 to_device;
    Entry entries[ENTRIES];
};

// Streaming accesses: nothing here is read twice, so it should not push out what decoding keeps in L2.
__device__ __forceinline__ void copy(uint4 *to, const uint4 *from, u32 count) {
    u32 i = threadIdx.x;
    for (; i + 3 * blockDim.x < count; i += 4 * blockDim.x) {
        uint4 a = __ldcs(from + i);
        uint4 b = __ldcs(from + i + blockDim.x);
        uint4 c = __ldcs(from + i + 2 * blockDim.x);
        uint4 d = __ldcs(from + i + 3 * blockDim.x);
        __stcs(to + i, a);
        __stcs(to + i + blockDim.x, b);
        __stcs(to + i + 2 * blockDim.x, c);
        __stcs(to + i + 3 * blockDim.x, d);
    }
    // The rest, up to three each, still all in flight before the first is stored.
    u32 j = i + blockDim.x, k = j + blockDim.x;
    uint4 a, b, c;
    if (i < count) a = __ldcs(from + i);
    if (j < count) b = __ldcs(from + j);
    if (k < count) c = __ldcs(from + k);
    if (i < count) __stcs(to + i, a);
    if (j < count) __stcs(to + j, b);
    if (k < count) __stcs(to + k, c);
}

extern "C" __global__ void __launch_bounds__(256) gather_scatter(const __grid_constant__ Launch launch) {
    const u32 units = launch.blocks * launch.slice_count;
    for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
        const u32 index = unit / launch.slice_count;
        const Slice slice = launch.slices[launch.first_slice + unit % launch.slice_count];
        const Entry entry = launch.entries[index];
        uint4 *device = (uint4 *)(slice.device + entry.block * slice.stride);
        const u64 offset = launch.step ? index * launch.step : (u64)entry.place * PLACE_BYTES;
        uint4 *other = (uint4 *)(launch.other + offset + (slice.at - launch.from));
        const u32 count = (u32)(slice.bytes / sizeof(uint4));
        if (launch.to_device)
            copy(device, other, count);
        else
            copy(other, device, count);
    }
}
