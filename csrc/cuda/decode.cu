// Forward of few queries, segment-major, in one launch: the queries of all readers of a segment against one
// chunk of its keys; the block that ends the last part of a row merges its parts.
//
//     lse_ic = log Σ_{j in c} e^{s_ij}       out_ic = Σ_{j in c} e^{s_ij - lse_ic} v_j
//     lse_i = log Σ_c e^{lse_ic}             out_i = Σ_c e^{lse_ic - lse_i} out_ic
//
// for the chunks c of query i's chain. A tile of q holds rows × Tq × group queries that read one segment, so
// that its keys are read once for all of them; own tokens are segments with one reader, a causal edge and a
// tile of Tq × group. Work items, one set's after another's, are (segment, tile of its queries, chunk of its
// keys), those of own tokens among them. Where a tile has at most 16 queries its warps share the keys instead
// of the queries. Parts are float32 and added in the order of the chain, whichever block is last, so the bits
// do not depend on the order of the blocks. No block waits for another.
#include "attend.cuh"
#include "kernels.cuh"
#include "launch.cuh"

namespace prefix_fast::cuda {

constexpr int kFewQueries = 16;
// Of rows of float32 sums: those that a warp stores at once are in different banks.
template <typename T, int D>
constexpr int kFoldPitch = D + (std::is_same_v<T, float> ? 4 : 8);

// Tiles of many queries (a warp has 16 of them) and of few (the warps share 16).
template <typename T, int D, bool kOptions>
struct DecodeShapes {
    static constexpr int kWarps = D <= (kIsHalf<T> ? 128 : 64) ? 4 : 2;
    static constexpr int kKeysOfWarp = std::is_same_v<T, float> ? 8 : 16;
    static constexpr int kMost = kOptions ? 64 : 128;  // head dim of queries in registers
    using Many = ForwardShape<T, D, 1, kWarps, kKeysOfWarp * kWarps, 2, 1, kMost>;
    using Few = ForwardShape<T, D, 1, kWarps, kKeysOfWarp * kWarps, 2, kWarps, kMost>;
    static constexpr int kThreads = Many::kThreads;
    static constexpr int kFolds =
        kWarps * kFewQueries * (kFoldPitch<T, D> + 2) * int{sizeof(float)};  // of the warps that share keys
    static constexpr int kSharedBytes = Many::kSharedBytes > kFolds ? Many::kSharedBytes : kFolds;
};

// A tile of queries that read one segment.
struct FoldedTile {
    int set, unit;
    int first_reader;  // in the set's order of rows
    int first, count,
        last;  // first of the tile's queries among all that read the segment, all of them, the last here
    int chunk, part;  // of the segment's keys; of all parts
};

struct Folded {
    int row, token, member;  // head within the group
};

__device__ inline Folded folded_at(const Call& call, const FoldedTile& tile, int folded) {
    const int group = call.heads / call.kv_heads, pair = folded / group;
    int row = tile.first_reader + pair / call.max_queries;
    if (tile.set < call.num_sets && call.sets[tile.set].ids.data != nullptr)
        row = call.sets[tile.set].order[row];
    return {row, pair % call.max_queries, folded % group};
}

// The work item of a block; last < first: it has nothing to do.
__device__ inline FoldedTile folded_tile(const Call& call, const Partials& partials, int item) {
    const int width = call.max_queries * (call.heads / call.kv_heads);
    FoldedTile tile{};
    int s = 0;
    while (s < call.num_sets && item >= partials.tiles[s] * partials.chunks[s]) {
        item -= partials.tiles[s] * partials.chunks[s];
        tile.part += partials.chunks[s];
        ++s;
    }
    const SegmentSet& set = call.sets[s];
    const int index = item % partials.tiles[s];
    int readers = 1, block = index;
    tile.set = s;
    tile.chunk = item / partials.tiles[s];
    tile.part += tile.chunk;
    const int queries = s == call.num_sets ? partials.own_queries : partials.queries;
    if (s == call.num_sets) {
        const int tiles = ceil_div(width, queries);
        tile.unit = tile.first_reader = index / tiles;
        block = index % tiles;
    } else if (set.ids.data == nullptr) {
        readers = call.rows;
    } else {
        const Integers starts{set.starts, 1, 4};
        packed_tile(index, starts, set.count, width, queries, &tile.unit, &block);
        tile.first_reader = set.starts[tile.unit];
        readers = set.starts[tile.unit + 1] - tile.first_reader;
    }
    tile.first = block * queries;
    tile.count = readers * width;
    tile.last = minimum(tile.first + queries, tile.count) - 1;
    return tile;
}

__device__ inline int64_t slot_of(const Call& call, int row, int kv_head, int token, int member) {
    const int group = call.heads / call.kv_heads;
    return ((int64_t{row} * call.kv_heads + kv_head) * call.max_queries + token) * group + member;
}

__device__ inline int64_t slots_of(const Call& call) {
    return int64_t{call.rows} * call.heads * call.max_queries;
}

// Merges the states of the warps that share keys and writes the part: their sums lie in shared memory.
template <typename Shape>
__device__ inline void fold_warps(const Call& call, const Partials& partials, const FoldedTile& tile,
                                  int kv_head, const State<1>& state, const float (&sums)[1][Shape::D / 8][4],
                                  bool natural) {
    using T = typename Shape::T;
    constexpr int D = Shape::D, kWarps = Shape::kKeyWarps;
    auto* outs = reinterpret_cast<float*>(dynamic_shared);           // [warps][16][kFoldPitch]
    float* maxima = outs + kWarps * kFewQueries * kFoldPitch<T, D>;  // [warps][16]
    float* totals = maxima + kWarps * kFewQueries;
    __syncthreads();  // the tiles of keys have been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp() * kFewQueries + 8 * half + lane_row();
        const float total = sum_of_row(state.total[0][half]);
        if (lane() % 4 == 0) maxima[row] = state.maximum[0][half], totals[row] = total;
        float* out = outs + row * kFoldPitch<T, D>;
        for_each_columns<T, D>(sums[0], half, [&](int column, auto values) {
            store_columns<float>(reinterpret_cast<char*>(out), column, values);
        });
    }
    __syncthreads();
    const float to_base_2 = natural ? kLog2e : 1;
    for (int place = warp(); place <= tile.last - tile.first; place += Shape::kWarps) {
        float largest = -infinity(), total = 0, factors[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, maxima[w * kFewQueries + place]);
        const float reference = largest == -infinity() ? 0 : largest;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            factors[w] = exp2_approx((maxima[w * kFewQueries + place] - reference) * to_base_2);
            total += totals[w * kFewQueries + place] * factors[w];
        }
        const Folded at = folded_at(call, tile, tile.first + place);
        const int64_t slot = tile.part * slots_of(call) + slot_of(call, at.row, kv_head, at.token, at.member);
        const float inverse = total == 0 ? 0 : 1 / total;
        if (lane() == 0) {
            partials.lse[slot] =
                total == 0 ? -infinity() : (natural ? largest : largest * kLn2) + logf(total);
        }
        if (total == 0) continue;
        for (int d = lane(); d < call.head_dim; d += kWarp) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w)
                sum += outs[(w * kFewQueries + place) * kFoldPitch<T, D> + d] * factors[w];
            partials.out[slot * call.head_dim + d] = sum * inverse;
        }
    }
}

// Writes the part from registers, where each warp has its own queries.
template <typename Shape>
__device__ inline void store_part(const Call& call, const Partials& partials, const FoldedTile& tile,
                                  int kv_head, const Rows<1>& rows, const State<1>& state,
                                  const float (&sums)[1][Shape::D / 8][4], bool natural) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(state.total[0][half]);
        const int place = Shape::first_row() + 8 * half + lane_row();
        if (tile.first + place > tile.last) continue;
        const int member = rows.head[0][half] - kv_head * (call.heads / call.kv_heads);
        const int64_t slot = tile.part * slots_of(call) +
                             slot_of(call, rows.row[0][half], kv_head, rows.token[0][half], member);
        const float largest = state.maximum[0][half], inverse = 1 / total;
        if (lane() % 4 == 0) {
            partials.lse[slot] =
                total == 0 ? -infinity() : (natural ? largest : largest * kLn2) + logf(total);
        }
        if (total == 0) continue;
        auto* out = reinterpret_cast<char*>(partials.out + slot * call.head_dim);
        store_row<float>(out, call.head_dim, inverse, [&](const auto& each) {
            for_each_columns<typename Shape::T, Shape::D>(sums[0], half, each);
        });
    }
}

// The part of one work item: its queries against its chunk of keys.
template <typename Shape, bool kOptions>
__device__ inline void compute_part(const Call& call, const Partials& partials, const FoldedTile& item,
                                    int kv_head) {
    using S = typename Shape::S;
    const bool own = item.set == call.num_sets, slide = slides(call, item.set);
    const int group = call.heads / call.kv_heads;
    const auto row_at = [&](int place) -> const char* {
        if (item.first + place > item.last) return nullptr;
        const Folded at = folded_at(call, item, item.first + place);
        return static_cast<const char*>(call.query.data) +
               offset_bytes(call.query, at.row, kv_head * group + at.member, at.token, sizeof(S));
    };
    Rows<1> rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int place = Shape::first_row() + 8 * half + lane_row();
        const Folded at = folded_at(call, item, minimum(item.first + place, item.last));
        rows.row[0][half] = at.row;
        rows.head[0][half] = kv_head * group + at.member;
        rows.token[0][half] = at.token;
        rows.position[0][half] = at.token;
        if (own || slide) rows.position[0][half] += offset_of(call, at.row);
        if (!own && slide) rows.position[0][half] += windowed_length(call, at.row, item.set);
    }
    const typename Shape::Queries queries =
        load_queries<Shape>(call.head_dim, sign_of<typename Shape::T>(call.scale), 0, row_at);

    // Readers of a segment in the window differ in what they see of it, and no row's bits may depend on its
    // company: all of it is masked, which changes nothing for those that see none of a tile.
    const SegmentSet& set = call.sets[item.set];
    const Chain chain = chain_of(set, item.unit, kv_head, 0, sizeof(S));
    const int offset = own ? offset_of(call, item.unit) : 0;
    KeyMask mask{nullptr, call.mask_token};
    if (own && call.key_mask != nullptr) mask.data = call.key_mask + item.unit * call.mask_unit;
    const KeyTile tile{item.set, 0, chain.valid, 0, own && call.causal != 0, slide, mask};
    const KeyBounds bounds = key_bounds(item.first / group + offset, item.last / group + offset, 0,
                                        chain.valid, call.window, tile.causal, own && slide, Shape::kKeys);
    const int length =
        ceil_div(ceil_div(maximum(bounds.high - bounds.low, 0), partials.chunks[item.set]), Shape::kKeys) *
        Shape::kKeys;
    const int begin = bounds.low + item.chunk * length;
    const auto list = TileList<Shape::kKeys>::of(bounds, mask.data != nullptr || (slide && !own), begin,
                                                 minimum(begin + length, bounds.high));
    const Source source{chain, set.key.token, set.value.token, set.is_float32 != 0, mask, call.head_dim};
    State<1> state;
    float sums[1][Shape::D / 8][4];
    state.clear();
    fill_zero(sums);
    attend<Shape, kOptions, !kOptions>(call, queries, rows, list, source, tile, positive_scale(call), state,
                                       sums);
    if constexpr (Shape::kKeyWarps > 1) {
        fold_warps<Shape>(call, partials, item, kv_head, state, sums, kOptions);
    } else {
        store_part<Shape>(call, partials, item, kv_head, rows, state, sums, kOptions);
    }
}

// Parts of a row: the chunks of the segments that it reads, and of its own tokens.
__device__ inline bool reads(const Call& call, int set, int row) {
    return set == call.num_sets || segment_of(call.sets[set], row) >= 0;
}

// One query's result from its parts, by one warp. Parts come from other blocks: they are read past the
// first-level cache, which may hold what stood there before.
__device__ inline void merge_query(const Call& call, const Partials& partials, const Results& results,
                                   int row, int kv_head, int token, int member) {
    const int head = kv_head * (call.heads / call.kv_heads) + member;
    const int64_t slot = slot_of(call, row, kv_head, token, member), slots = slots_of(call);
    const bool has_sink = call.sinks != nullptr;
    const float sink = has_sink ? read_float(call.sinks, head * call.sinks_stride, call.sinks_dtype) : 0;
    float largest = -infinity();
    int first = 0;
    for (int s = 0; s <= call.num_sets; first += partials.chunks[s++]) {
        if (!reads(call, s, row)) continue;
        for (int c = 0; c < partials.chunks[s]; ++c) {
            largest = fmaxf(largest, __ldcg(partials.lse + (first + c) * slots + slot));
        }
    }
    const bool empty = largest == -infinity();
    if (has_sink) largest = fmaxf(largest, sink);
    float total = has_sink ? exp2_approx((sink - largest) * kLog2e) : 0;
    float sums[8] = {};  // dims lane, lane + 32, ...
    first = 0;
    for (int s = 0; s <= call.num_sets; first += partials.chunks[s++]) {
        if (empty || !reads(call, s, row)) continue;
        for (int c = 0; c < partials.chunks[s]; ++c) {
            const int64_t place = (first + c) * slots + slot;
            const float level = __ldcg(partials.lse + place);
            if (level == -infinity()) continue;  // nothing was written there
            const float weight = exp2_approx((level - largest) * kLog2e);
            total += weight;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int d = lane() + kWarp * i;
                if (d < call.head_dim) sums[i] += weight * __ldcg(partials.out + place * call.head_dim + d);
            }
        }
    }
    const float inverse = empty ? 0 : 1 / (total * call.kept_share);
    char* out = static_cast<char*>(results.out.data) +
                offset_bytes(results.out, row, head, token, call.dtype == kFloat32 ? 4 : 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int d = lane() + kWarp * i;
        if (d < call.head_dim) write_float(out, d, sums[i] * inverse, call.dtype);
    }
    if (lane() == 0) {
        const Levels& lse = results.lse;
        lse.data[row * lse.unit + head * lse.head + token * lse.token] =
            empty ? -infinity() : largest + logf(total);
    }
}

// Counts this block's part for every row of its tile, and merges the rows whose last part it was.
__device__ __noinline__ inline void merge_finished(const Call& call, const Partials& partials,
                                                   const Results& results, FoldedTile tile, int kv_head,
                                                   int warps) {
    auto* finished = reinterpret_cast<int*>(dynamic_shared);  // rows, -1: not finished; behind the barrier
    const int group = call.heads / call.kv_heads, width = call.max_queries * group;
    __syncthreads();
    __threadfence();  // the block's part is in memory before it is counted
    const int first_row = tile.first / width, rows = tile.last / width - first_row + 1;
    for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int from = maximum(tile.first, (first_row + i) * width);
        const int done = minimum(tile.last + 1, (first_row + i + 1) * width) - from;
        const int row = folded_at(call, tile, from).row;
        int parts = 0;
        for (int s = 0; s <= call.num_sets; ++s) parts += reads(call, s, row) ? partials.chunks[s] : 0;
        int32_t* counter = partials.counters + row * call.kv_heads + kv_head;
        const bool last = atomicAdd(counter, done) + done == parts * width;
        if (last) *counter = 0;
        finished[i] = last ? row : -1;
    }
    __threadfence();  // and the other parts are read after they were counted
    __syncthreads();
    for (int i = 0; i < rows; ++i) {
        if (finished[i] < 0) continue;
        for (int q = warp(); q < width; q += warps) {
            merge_query(call, partials, results, finished[i], kv_head, q / group, q % group);
        }
    }
}

// Grid: (Σ over sets of tiles × chunks, Hkv). Tiles are fastest: blocks side by side read the same keys.
template <typename Shapes, bool kOptions>
__global__ void __launch_bounds__(Shapes::kThreads, resident_blocks(Shapes::kThreads))
    decode_kernel(const __grid_constant__ Call call, const __grid_constant__ Partials partials,
                  const __grid_constant__ Results results) {
    const FoldedTile tile = folded_tile(call, partials, blockIdx.x);
    if (tile.last < tile.first) return;
    const int kv_head = blockIdx.y;
    const int queries = tile.set == call.num_sets ? partials.own_queries : partials.queries;
    if (queries == kFewQueries) {
        compute_part<typename Shapes::Few, kOptions>(call, partials, tile, kv_head);
    } else {
        compute_part<typename Shapes::Many, kOptions>(call, partials, tile, kv_head);
    }
    merge_finished(call, partials, results, tile, kv_head, Shapes::kWarps);
}

template <typename Shapes, bool kOptions>
int launch_decode(const Call& call, const Partials& given, const Results& results, void* stream) {
    Partials partials = given;
    const int width = call.max_queries * (call.heads / call.kv_heads);
    partials.queries = given.queries ? Shapes::Many::kQueries : kFewQueries;
    partials.own_queries = given.own_queries ? Shapes::Many::kQueries : kFewQueries;
    int items = 0;
    for (int s = 0; s <= call.num_sets; ++s) {
        const SegmentSet& set = call.sets[s];
        const bool own = s == call.num_sets, all = set.ids.data == nullptr;
        partials.tiles[s] = own   ? call.rows * ceil_div(width, partials.own_queries)
                            : all ? ceil_div(call.rows * width, partials.queries)
                                  : call.rows * width / partials.queries + set.count;
        items += partials.tiles[s] * partials.chunks[s];
    }
    const dim3 grid(items, call.kv_heads), block(Shapes::kThreads);
    return static_cast<int>(PREFIX_FAST_LAUNCH((decode_kernel<Shapes, kOptions>), grid, block,
                                               Shapes::kSharedBytes, static_cast<cudaStream_t>(stream), call,
                                               partials, results));
}

// `partials` has the numbers of chunks, and 0 or 1 in `queries`, `own_queries`: whether tiles hold many
// queries. The tiles' sizes and numbers are filled in here.
template <typename T>
int decode(const Call& call, const Partials& partials, const Results& results, void* stream) {
    return with_head_dim<T, true>(call.head_dim, [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        return has_options(call)
                   ? launch_decode<DecodeShapes<T, D, true>, true>(call, partials, results, stream)
                   : launch_decode<DecodeShapes<T, D, false>, false>(call, partials, results, stream);
    });
}

}  // namespace prefix_fast::cuda

#define PREFIX_FAST_DEFINE(name, type)                                                    \
    PREFIX_FAST_EXPORT int prefix_fast_decode_##name(                                     \
        const prefix_fast::cuda::Call* call, const prefix_fast::cuda::Partials* partials, \
        const prefix_fast::cuda::Results* results, void* stream) {                        \
        return prefix_fast::cuda::decode<type>(*call, *partials, *results, stream);       \
    }                                                                                     \
    PREFIX_FAST_EXPORT int prefix_fast_decode_tile_##name(int head_dim, bool many) {      \
        using namespace prefix_fast::cuda;                                                \
        if (!many) return kFewQueries;                                                    \
        return with_head_dim<type, true>(head_dim, [](auto dim) {                         \
            return DecodeShapes<type, decltype(dim)::value, false>::Many::kQueries;       \
        });                                                                               \
    }
PREFIX_FAST_TYPES(PREFIX_FAST_DEFINE)
