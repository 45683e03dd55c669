// What edgemoe asks of the operating system: files, address space, page cache. (Signals have a file of their own, and
// lanes ask for their slices of the processor.)
//
// Linux is the target; the macOS branches are written after its manual pages. Windows is refused at build time.
// All sizes are bytes. Failures throw SystemError, whose message names the file and what the system said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace edgemoe {

struct SystemError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

size_t page_size();

inline uint64_t page_floor(uint64_t n) { return n / page_size() * page_size(); }
inline uint64_t page_ceil(uint64_t n) { return page_floor(n + page_size() - 1); }

// One part of a model, open for reading: by buffered reads, by O_DIRECT, or mapped over a place in memory.
// Thread-safe: no call moves a shared file position.
class MappedFile {
   public:
    explicit MappedFile(std::string path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const std::string& path() const { return path_; }
    uint64_t size() const { return size_; }

    // Opens the O_DIRECT descriptor. False where the file system refuses it; `why` then says so.
    bool open_direct(std::string& why);

    // Reads exactly n bytes through the page cache.
    void read(uint64_t offset, std::byte* to, size_t n) const;

    // Reads exactly n bytes past the page cache, and returns how many the disk gave: whole pages. `to` is congruent to
    // `offset` modulo the page size. Pages of which only a part is asked for come to `edges`, two pages of memory, and
    // no byte beside the n is written.
    size_t read_direct(uint64_t offset, std::byte* to, size_t n, std::byte* edges) const;

    // Maps the file's pages [offset, offset + n) read-only over `place`, replacing what was there. Nothing is read yet.
    void map_over(std::byte* place, uint64_t offset, size_t n) const;

    // Throws if the file has been truncated, rewritten or touched since it was opened. A rename over it is harmless:
    // this descriptor keeps the old file.
    void check_unchanged() const;

    // Drops the file's clean pages [offset, offset + n) from the page cache; n = 0 means to the end.
    void forget(uint64_t offset, uint64_t n) const;

   private:
    std::string path_;
    int fd_ = -1;
    int direct_fd_ = -1;
    uint64_t size_ = 0;
    int64_t modified_ns_ = 0;
};

// Address space without memory behind it: pages cost RAM only once they are written.
std::byte* reserve_memory(size_t n);
void release_memory(std::byte* base, size_t n);

// Makes [base, base + n) such address space again, whatever was mapped there.
void reserve_over(std::byte* base, size_t n);

// Small pages only: a huge page would commit its neighbours' memory too.
void use_small_pages(std::byte* base, size_t n);

// 2 MiB on x86-64, as much as 512 MiB where pages are of 64 KiB.
size_t huge_page_size();
std::byte* next_huge_page(std::byte* from);  // `from` itself, if one begins there

// Huge pages where the system has them to spare and they lie wholly in [base, base + n). One is committed whole as soon
// as any of it is used.
void use_huge_pages(std::byte* base, size_t n);

// Gives the anonymous pages of [base, base + n) back; whole pages only. They read as zero afterwards. False where the
// system keeps them, as it does locked ones.
bool discard(std::byte* base, size_t n);

// Moves the anonymous pages of [from, from + n) to `to`; both places are reserved memory, and `from` reads as zero
// afterwards. False where the system cannot: then `to` is reserved memory again, and `from` is as it was.
bool move_pages(std::byte* from, std::byte* to, size_t n);

// How many separate areas of memory the system lets a process have.
size_t most_memory_areas();

// Brings in the pages of a file mapping, in large reads. Throws where the file has become shorter.
void populate(std::byte* base, size_t n, const std::string& path);

// Has the allocator hand freed memory back: large blocks at once from now on, the rest of what is free now.
void return_freed_memory();

}  // namespace edgemoe
