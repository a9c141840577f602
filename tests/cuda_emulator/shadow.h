// Shadow memory: for every byte who wrote and read it last and when, and whether it holds anything yet.
//
// Four bytes share a cell until one of them is touched alone. A cell remembers its last writer, its last
// reader and one earlier reader of another warp, so that a write after two unordered reads is judged against
// both.
#pragma once

#include "order.h"

namespace cuda_emulator {

enum Access : uint8_t { kRead = 1, kWrite = 2, kAtomic = 4, kAsyncBegin = 8, kAsyncEnd = 16 };

struct Cell {
    uint32_t written_at, writer;
    uint32_t read_at, reader, older_reader;  // an older reader exists if `older` is set
    enum State : uint8_t { kUntouched, kWritten, kInFlight } state;
    uint8_t older : 1, split : 1, by_atomic : 1;
};

class Shadow {
  public:
    enum class Space : uint8_t { kShared, kGlobal };
    Shadow(Space space, size_t bytes, bool starts_written);
    ~Shadow();
    Shadow(const Shadow&) = delete;
    Shadow& operator=(const Shadow&) = delete;

    // Judges and records an access of the running thread to [offset, offset + bytes).
    void touch(size_t offset, size_t bytes, uint8_t access, uint64_t place, const void* address);
    // Forgets what is known of [offset, offset + bytes), whole words.
    void clear(size_t offset, size_t bytes);
    // As if a copy between launches had written [offset, offset + bytes).
    void fill(size_t offset, size_t bytes);

  private:
    void judge(Cell& cell, uint8_t access, uint64_t place, const void* address, size_t bytes);
    bool read_quietly(Cell& cell, const Thread& me) const;
    void join(Cell& cell, const Cell* parts, uint32_t ordered_time) const;
    bool ordered(const Thread& me, uint32_t other, uint32_t time) const;

    Space space_;
    Cell::State start_;
    size_t words_;
    Cell* cells_;  // one for each word
    Cell* bytes_;  // four for each word; pages exist once a word is split
};

}  // namespace cuda_emulator
