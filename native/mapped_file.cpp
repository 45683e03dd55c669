#include "mapped_file.h"

#if defined(_WIN32)
#error "edgemoe runs on Linux; on Windows use it inside WSL 2"
#endif

#include <fcntl.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

// The kernel that runs it counts, and says itself what it does not know, not the headers that it was built with.
#if defined(__linux__) && !defined(MREMAP_DONTUNMAP)
#define MREMAP_DONTUNMAP 4
#endif
#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#endif

static_assert(sizeof(off_t) == 8 && sizeof(void*) == 8, "models need 64-bit file offsets and addresses");

namespace edgemoe {

namespace {

std::string describe(const std::string& path, const char* what) {
    return std::string(what) + " " + path + " failed: " + std::strerror(errno);
}

int64_t modification_time(const struct stat& info) {
#if defined(__APPLE__)
    return info.st_mtimespec.tv_sec * 1000000000LL + info.st_mtimespec.tv_nsec;
#else
    return info.st_mtim.tv_sec * 1000000000LL + info.st_mtim.tv_nsec;
#endif
}

using Pieces = std::array<iovec, 3>;  // of memory, filled one after the other; some are empty

// The one loop that handles EINTR and short reads. Returns how much arrived: less than `needed` only at the end of the
// file. It does not ask again once `needed` is there, because some file systems refuse an unaligned O_DIRECT read even
// where there is nothing left to give.
size_t read_fully(int fd, uint64_t offset, Pieces pieces, size_t needed, const std::string& path) {
    size_t done = 0;
    auto piece = pieces.begin();
    while (done < needed) {
        const ssize_t got =
            ::preadv(fd, &*piece, static_cast<int>(pieces.end() - piece), static_cast<off_t>(offset + done));
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            throw SystemError(describe(path, "reading"));
        }
        if (got == 0) {
            break;
        }
        done += static_cast<size_t>(got);
        for (auto left = static_cast<size_t>(got); left > 0;) {
            const size_t n = std::min(left, piece->iov_len);
            piece->iov_base = static_cast<std::byte*>(piece->iov_base) + n;
            piece->iov_len -= n;
            left -= n;
            piece += left > 0 ? 1 : 0;
        }
    }
    return done;
}

[[noreturn]] void throw_short(const std::string& path, uint64_t offset, size_t got, size_t needed) {
    throw SystemError("reading " + path + " at byte " + std::to_string(offset) + " gave " + std::to_string(got) +
                      " bytes of " + std::to_string(needed) + ": the file has become shorter or the disk is failing");
}

}  // namespace

size_t page_size() {
    static const size_t size = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    return size;
}

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
    // O_NONBLOCK: opening a pipe must not wait for somebody to write into it.
    fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd_ < 0) {
        throw SystemError(describe(path_, "opening"));
    }
    struct stat info{};
    if (::fstat(fd_, &info) != 0) {
        const std::string message = describe(path_, "examining");
        ::close(fd_);
        throw SystemError(message);
    }
    if (!S_ISREG(info.st_mode)) {
        ::close(fd_);
        throw SystemError("opening " + path_ + " failed: not a regular file");
    }
    size_ = static_cast<uint64_t>(info.st_size);
    modified_ns_ = modification_time(info);
#if defined(POSIX_FADV_RANDOM)
    // Reads say exactly what they need; read-ahead around them would stay in the page cache, which the budget counts.
    ::posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
#endif
}

MappedFile::~MappedFile() {
    ::close(fd_);
    if (direct_fd_ >= 0) {
        ::close(direct_fd_);
    }
}

bool MappedFile::open_direct(std::string& why) {
#if defined(__APPLE__)
    direct_fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (direct_fd_ >= 0 && ::fcntl(direct_fd_, F_NOCACHE, 1) != 0) {
        ::close(std::exchange(direct_fd_, -1));
    }
#else
    direct_fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    if (direct_fd_ < 0) {
        why = std::string("the file system refuses O_DIRECT (") + std::strerror(errno) + ")";
        return false;
    }
    struct stat opened{};
    struct stat now{};
    if (::fstat(fd_, &opened) != 0 || ::fstat(direct_fd_, &now) != 0 || opened.st_dev != now.st_dev ||
        opened.st_ino != now.st_ino) {
        ::close(std::exchange(direct_fd_, -1));
        why = "the file was replaced by another one while it was being opened";
        return false;
    }
    return true;
}

void MappedFile::read(uint64_t offset, std::byte* to, size_t n) const {
    const size_t got = read_fully(fd_, offset, {{{to, n}, {}, {}}}, n, path_);
    if (got < n) {
        throw_short(path_, offset, got, n);
    }
}

size_t MappedFile::read_direct(uint64_t offset, std::byte* to, size_t n, std::byte* edges) const {
    const uint64_t end = offset + n;
    const uint64_t start = page_floor(offset);
    const uint64_t whole = page_ceil(end) - start;
    const uint64_t before = offset - start;
    const uint64_t first = before > 0 || n < page_size() ? page_size() : 0;  // where they are no whole pages of its own
    const uint64_t last = end % page_size() > 0 && whole > first ? page_size() : 0;
    std::byte* const inside = to - before + first;
    const size_t got =
        read_fully(direct_fd_, start, {{{edges, first}, {inside, whole - first - last}, {edges + page_size(), last}}},
                   before + n, path_);
    if (got < before + n) {
        throw_short(path_, start, got, before + n);
    }
    if (first > 0) {
        std::memcpy(to, edges + before, std::min<uint64_t>(n, first - before));
    }
    if (last > 0) {
        std::memcpy(inside + (whole - first - last), edges + page_size(), end % page_size());
    }
    return whole;
}

void MappedFile::map_over(std::byte* place, uint64_t offset, size_t n) const {
    void* mapped = ::mmap(place, n, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd_, static_cast<off_t>(offset));
    if (mapped == MAP_FAILED) {
        throw SystemError(describe(path_, "mapping"));
    }
    // Read-ahead would bring in experts that nobody selected.
    ::madvise(place, n, MADV_RANDOM);
}

void MappedFile::check_unchanged() const {
    struct stat info{};
    if (::fstat(fd_, &info) != 0) {
        throw SystemError(describe(path_, "examining"));
    }
    if (static_cast<uint64_t>(info.st_size) != size_ || modification_time(info) != modified_ns_) {
        throw SystemError("the model file " + path_ + " was changed while in use (" + std::to_string(size_) +
                          " bytes when opened, now " + std::to_string(info.st_size) + ")");
    }
}

void MappedFile::forget(uint64_t offset, uint64_t n) const {
#if defined(POSIX_FADV_DONTNEED)
    ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(n), POSIX_FADV_DONTNEED);
#else
    static_cast<void>(offset);
    static_cast<void>(n);
#endif
}

namespace {

std::byte* map_reserved(void* where, size_t n, int flags) {
    flags |= MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* base = ::mmap(where, n, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED) {
        throw SystemError("reserving " + std::to_string(n) + " bytes of address space failed: " + std::strerror(errno));
    }
#if defined(MADV_DONTFORK)
    // A fork may not have the disk write to memory that it shares, nor double what is written here later.
    ::madvise(base, n, MADV_DONTFORK);
#endif
    return static_cast<std::byte*>(base);
}

}  // namespace

std::byte* reserve_memory(size_t n) { return map_reserved(nullptr, n, 0); }

void reserve_over(std::byte* base, size_t n) { map_reserved(base, n, MAP_FIXED); }

void release_memory(std::byte* base, size_t n) { ::munmap(base, n); }

void use_small_pages(std::byte* base, size_t n) {
#if defined(MADV_NOHUGEPAGE)
    ::madvise(base, n, MADV_NOHUGEPAGE);
#else
    static_cast<void>(base);
    static_cast<void>(n);
#endif
}

namespace {

// What a file of the kernel's says.
size_t number_in(const char* path, size_t otherwise) {
    size_t n = otherwise;
    if (std::FILE* file = std::fopen(path, "r")) {
        if (std::fscanf(file, "%zu", &n) != 1) {
            n = otherwise;
        }
        std::fclose(file);
    }
    return n;
}

}  // namespace

size_t huge_page_size() {
    static const size_t size = number_in("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", size_t{2} << 20);
    return size;
}

std::byte* next_huge_page(std::byte* from) {
    const auto at = reinterpret_cast<uintptr_t>(from);
    return reinterpret_cast<std::byte*>((at + huge_page_size() - 1) / huge_page_size() * huge_page_size());
}

void use_huge_pages(std::byte* base, size_t n) {
#if defined(MADV_HUGEPAGE)
    std::byte* const first = next_huge_page(base);
    if (first < base + n) {
        ::madvise(first, static_cast<size_t>(base + n - first) / huge_page_size() * huge_page_size(), MADV_HUGEPAGE);
    }
#else
    static_cast<void>(base);
    static_cast<void>(n);
#endif
}

bool discard(std::byte* base, size_t n) {
#if defined(__APPLE__)
    // MADV_DONTNEED is only a hint there; mapping fresh pages over the range really gives the old ones back.
    if (n > 0) {
        reserve_over(base, n);
    }
    return true;
#else
    return n == 0 || ::madvise(base, n, MADV_DONTNEED) == 0;
#endif
}

bool move_pages(std::byte* from, std::byte* to, size_t n) {
#if defined(MREMAP_DONTUNMAP)
    if (::mremap(from, n, n, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) != MAP_FAILED) {
        return true;
    }
    // Before Linux 6.17 the place is unmapped first, and then the move is refused, where `from` is of two areas.
    reserve_over(to, n);
    use_small_pages(to, n);
#else
    static_cast<void>(from);
    static_cast<void>(to);
    static_cast<void>(n);
#endif
    return false;
}

size_t most_memory_areas() {
    return number_in("/proc/sys/vm/max_map_count", 65530);  // Linux's default
}

void populate(std::byte* base, size_t n, const std::string& path) {
    ::madvise(base, n, MADV_WILLNEED);
#if defined(MADV_POPULATE_READ)
    if (::madvise(base, n, MADV_POPULATE_READ) == 0) {
        return;
    }
    if (errno != EINVAL) {
        throw SystemError(describe(path, "reading (mapped)"));
    }
#else
    static_cast<void>(path);
#endif
    // Before Linux 5.14, and on macOS: touch each page.
    for (size_t at = 0; at < n; at += page_size()) {
        static_cast<void>(*reinterpret_cast<const volatile unsigned char*>(base + at));
    }
}

void return_freed_memory() {
#if defined(__GLIBC__)
    // A fixed threshold: left alone, it grows with each large block freed, and such blocks then stay in the heap.
    ::mallopt(M_MMAP_THRESHOLD, 4 << 20);
    ::malloc_trim(0);
#endif
}

}  // namespace edgemoe
