// A test framework in one page: TEST registers a case, CHECK* end it at the first thing that is wrong.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "mapped_file.h"

namespace check {

struct Case {
    const char* name;
    void (*body)();
};
struct Skipped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

struct Registration {
    Registration(const char* name, void (*body)()) { cases().push_back({name, body}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename Left, typename Right>
void equal(const Left& left, const Right& right, const char* file, int line, const char* what) {
    if (!(left == right)) {
        std::ostringstream text;
        text << what << ": " << left << " is not " << right;
        fail(file, line, text.str());
    }
}

// The message of the SystemError that `action` must throw.
template <typename Action>
std::string message_of(const Action& action, const char* file, int line) {
    try {
        action();
    } catch (const edgemoe::SystemError& error) {
        return error.what();
    }
    fail(file, line, "no SystemError was thrown");
}

inline int run_all() {
    int n_failed = 0;
    for (const Case& test : cases()) {
        try {
            test.body();
            std::printf("ok      %s\n", test.name);
        } catch (const Skipped& why) {
            std::printf("skipped %s: %s\n", test.name, why.what());
        } catch (const std::exception& error) {
            std::printf("FAILED  %s\n        %s\n", test.name, error.what());
            ++n_failed;
        }
        std::fflush(stdout);
    }
    return n_failed == 0 && !cases().empty() ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                   \
    static void name();                                              \
    static const check::Registration name##_registered{#name, name}; \
    static void name()

#define CHECK(condition)                                 \
    do {                                                 \
        if (!(condition)) {                              \
            check::fail(__FILE__, __LINE__, #condition); \
        }                                                \
    } while (false)

#define CHECK_EQUAL(left, right) check::equal((left), (right), __FILE__, __LINE__, #left " == " #right)

// `statement` throws a SystemError whose message has `part` in it.
#define CHECK_REFUSED(statement, part)                                                      \
    do {                                                                                    \
        const std::string said = check::message_of([&] { statement; }, __FILE__, __LINE__); \
        if (said.find(part) == std::string::npos) {                                         \
            check::fail(__FILE__, __LINE__, "\"" + said + "\" does not say " + (part));     \
        }                                                                                   \
    } while (false)

int main() { return check::run_all(); }
