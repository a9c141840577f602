#include "shadow.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_emulator {

namespace {

Cell* map_cells(size_t count) {
    void* memory = mmap(nullptr, (count + 1) * sizeof(Cell), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fprintf(stderr, "cuda_emulator: no address space for the shadow of %zu cells\n", count);
        std::abort();
    }
    return static_cast<Cell*>(memory);
}

const char* verb(uint8_t access) {
    if (access & kAtomic) return "atomic operation";
    if (access & (kAsyncBegin | kAsyncEnd)) return "cp.async";
    return access & kWrite ? "write" : "read";
}

}  // namespace

Shadow::Shadow(Space space, size_t bytes, bool starts_written)
    : space_(space),
      start_(starts_written ? Cell::kWritten : Cell::kUntouched),
      words_((bytes + 3) / 4),
      cells_(map_cells(words_)),
      bytes_(map_cells(4 * words_)) {}

Shadow::~Shadow() {
    munmap(cells_, (words_ + 1) * sizeof(Cell));
    munmap(bytes_, (4 * words_ + 1) * sizeof(Cell));
}

void Shadow::clear(size_t offset, size_t bytes) {
    std::memset(static_cast<void*>(cells_ + offset / 4), 0, (bytes + 3) / 4 * sizeof(Cell));
}

void Shadow::fill(size_t offset, size_t bytes) {
    for (size_t at = offset; at < offset + bytes; ++at) {
        Cell& cell = cells_[at / 4];
        cell = Cell{};
        cell.state = Cell::kWritten;
    }
}

inline bool Shadow::ordered(const Thread& me, uint32_t other, uint32_t time) const {
    return space_ == Space::kShared ? known_in_block(me, other, time) : known(me, other, time);
}

inline void Shadow::judge(Cell& cell, uint8_t access, uint64_t place, const void* address, size_t bytes) {
    const Thread& me = *machine.current;
    if (cell.state == Cell::kInFlight && !(access & kAsyncEnd)) {
        report(Check::kMissingWait, place, address, bytes,
               "%s of bytes that the cp.async of %s may still write", verb(access),
               name_of(cell.writer).c_str());
        return;
    }
    if (access & kRead && cell.state == Cell::kUntouched && start_ == Cell::kUntouched)
        report(Check::kUninitialisedRead, place, address, bytes, "%s of %s memory that nothing has written",
               verb(access), space_ == Space::kShared ? "shared" : "global");
    const bool both_atomic = access & kAtomic && cell.by_atomic;
    if (cell.written_at != 0 && cell.writer != me.id && !both_atomic &&
        !ordered(me, cell.writer, cell.written_at))
        report(Check::kRace, place, address, bytes, "%s, not ordered behind the write by %s", verb(access),
               name_of(cell.writer).c_str());
    if (access & (kWrite | kAsyncBegin)) {
        if (cell.read_at != 0) {  // by a plain read: atomics leave no readers
            const bool reader_ordered = cell.reader == me.id || ordered(me, cell.reader, cell.read_at);
            // The older reader's time is not kept: it is at most read_at, and after it no partial barrier may
            // have come.
            const bool older_unordered = cell.older && cell.older_reader != me.id &&
                                         me.warp->block->named_time <= me.warp->block->time &&
                                         cell.older_reader / kMaxThreads == me.id / kMaxThreads &&
                                         !ordered(me, cell.older_reader, cell.read_at);
            if (!reader_ordered || older_unordered)
                report(Check::kRace, place, address, bytes, "%s, not ordered behind the read by %s",
                       verb(access), name_of(reader_ordered ? cell.older_reader : cell.reader).c_str());
        }
        cell.written_at = machine.clock;
        cell.writer = me.id;
        cell.by_atomic = (access & kAtomic) != 0;
        cell.state = access & kAsyncBegin ? Cell::kInFlight : Cell::kWritten;
        cell.read_at = 0;
        cell.older = false;
    } else if (access & kAsyncEnd) {
        cell.written_at = machine.clock;
        cell.state = Cell::kWritten;
    } else {
        if (cell.read_at != 0 && cell.reader / kLanes != me.id / kLanes) {
            cell.older = true;
            cell.older_reader = cell.reader;
        }
        cell.reader = me.id;
        cell.read_at = machine.clock;
    }
}

// Makes one cell of four whose accesses all lie before the last barrier.
void Shadow::join(Cell& cell, const Cell* parts, uint32_t ordered_time) const {
    for (int i = 0; i < 4; ++i)
        if (parts[i].state != Cell::kWritten || parts[i].written_at >= ordered_time ||
            parts[i].read_at >= ordered_time)
            return;
    cell = parts[0];
}

// The usual read of shared memory: of whole cells that were written before the last barrier.
inline bool Shadow::read_quietly(Cell& cell, const Thread& me) const {
    const uint32_t ordered_time = me.warp->block->time;
    if (cell.split) join(cell, bytes_ + 4 * (&cell - cells_), ordered_time);
    if (cell.state != Cell::kWritten || cell.split || cell.written_at >= ordered_time) return false;
    if (cell.read_at < ordered_time) {
        cell.older = false;
    } else if (cell.reader / kLanes != me.id / kLanes) {
        cell.older = true;
        cell.older_reader = cell.reader;
    }
    cell.reader = me.id;
    cell.read_at = machine.clock;
    return true;
}

void Shadow::touch(size_t offset, size_t bytes, uint8_t access, uint64_t place, const void* address) {
    if (access == kRead && space_ == Space::kShared && (offset | bytes) % 4 == 0) {
        const Thread& me = *machine.current;
        Cell *cell = cells_ + offset / 4, *end = cell + bytes / 4;
        while (cell != end && read_quietly(*cell, me)) ++cell;
        if (cell == end) return;
    }
    const char* at = static_cast<const char*>(address);
    const size_t end = offset + bytes;
    for (size_t word = offset / 4; word * 4 < end; ++word) {
        Cell& cell = cells_[word];
        const size_t first = word * 4 < offset ? offset - word * 4 : 0,
                     last = end < word * 4 + 4 ? end - word * 4 : 4;
        const bool whole = last - first == 4;
        if (whole && !cell.split) {
            judge(cell, access, place, at + (word * 4 - offset), bytes);
            continue;
        }
        Cell* parts = bytes_ + 4 * word;
        if (!cell.split) {
            for (int i = 0; i < 4; ++i) parts[i] = cell;
            cell.split = true;
        }
        for (size_t i = first; i < last; ++i)
            judge(parts[i], access, place, at + (word * 4 + i - offset), bytes);
        if (whole && access & (kWrite | kAsyncBegin)) cell = parts[0];  // all four are alike again
    }
}

}  // namespace cuda_emulator
