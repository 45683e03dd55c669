// A file of known random bytes in the working directory, gone at the end of the test.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

using Bytes = std::vector<std::byte>;

inline Bytes random_bytes(size_t n, uint64_t seed) {
    std::mt19937_64 random(seed);
    Bytes bytes(n);
    for (size_t at = 0; at < n; at += sizeof(uint64_t)) {
        const uint64_t number = random();
        std::memcpy(bytes.data() + at, &number, std::min(sizeof(number), n - at));
    }
    return bytes;
}

class ScratchFile {
   public:
    explicit ScratchFile(Bytes bytes) : bytes_(std::move(bytes)) {
        static int n_made = 0;
        path_ = "scratch-" + std::to_string(::getpid()) + "-" + std::to_string(n_made++) + ".bin";
        restore();
    }
    ~ScratchFile() { ::unlink(path_.c_str()); }
    ScratchFile(const ScratchFile&) = delete;
    ScratchFile& operator=(const ScratchFile&) = delete;

    const std::string& path() const { return path_; }
    const Bytes& bytes() const { return bytes_; }

    // The original bytes and modification time, in the same inode. The time is long ago, so that whatever a test does
    // later changes it, however coarse the file system's clock.
    void restore() {
        overwrite(0, bytes_);
        truncate(bytes_.size());
        set_modified(1000000000);
    }
    void overwrite(uint64_t offset, const Bytes& bytes) {
        const int fd = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        size_t done = 0;
        while (fd >= 0 && done < bytes.size()) {
            const ssize_t put =
                ::pwrite(fd, bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
            if (put <= 0) {
                break;
            }
            done += static_cast<size_t>(put);
        }
        ::close(fd);
        CHECK_EQUAL(done, bytes.size());
    }
    void truncate(uint64_t size) { CHECK_EQUAL(::truncate(path_.c_str(), static_cast<off_t>(size)), 0); }
    void set_modified(time_t seconds) {
        const struct timespec times[2] = {{seconds, 0}, {seconds, 0}};
        CHECK_EQUAL(::utimensat(AT_FDCWD, path_.c_str(), times, 0), 0);
    }

   private:
    std::string path_;
    Bytes bytes_;
};
