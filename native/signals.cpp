#include "signals.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <iterator>
#include <mutex>

#include "mapped_file.h"

namespace edgemoe {

// ---------------------------------------------------------------- SIGBUS

namespace {

// A signal handler may only touch lock-free statics, hence a fixed table. A free slot has size 0.
struct WatchedRange {
    std::atomic<uintptr_t> base{0};
    std::atomic<size_t> size{0};
    std::atomic<bool> faulted{false};
};

WatchedRange watched[256];
struct sigaction previous_action;

void on_bus_error(int signal, siginfo_t* info, void* context) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    for (WatchedRange& range : watched) {
        const uintptr_t base = range.base.load();
        if (range.size.load() != 0 && address >= base && address < base + range.size.load()) {
            range.faulted = true;
            const int interrupted_errno = errno;
            void* page = reinterpret_cast<void*>(address / page_size() * page_size());
            const void* zeros =
                ::mmap(page, page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            errno = interrupted_errno;
            if (zeros != MAP_FAILED) {
                return;
            }
            break;  // returning would fault again, for ever
        }
    }
    if ((previous_action.sa_flags & SA_SIGINFO) != 0 && previous_action.sa_sigaction != nullptr) {
        previous_action.sa_sigaction(signal, info, context);
    } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
        previous_action.sa_handler(signal);
    } else {
        ::signal(signal, SIG_DFL);  // returning runs the instruction again, and this time it kills
        if (info->si_code <= 0) {   // sent by a process: there is no such instruction
            ::raise(signal);
        }
    }
}

void install_handler() {
    page_size();  // its static must exist before a signal needs it
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &previous_action);
}

}  // namespace

void BusErrorGuard::watch(std::byte* base, size_t n) {
    static std::once_flag installed;
    std::call_once(installed, install_handler);
    for (int slot = 0; slot < static_cast<int>(std::size(watched)) && n_slots_ < kMaxRanges; ++slot) {
        uintptr_t free_base = 0;
        if (watched[slot].base.compare_exchange_strong(free_base, reinterpret_cast<uintptr_t>(base))) {
            watched[slot].faulted = false;
            watched[slot].size = n;
            slots_[n_slots_++] = slot;
            return;
        }
    }
    throw SystemError("too many models are open in mmap mode at once; close one, or use io=pread");
}

bool BusErrorGuard::faulted() const {
    for (int i = 0; i < n_slots_; ++i) {
        if (watched[slots_[i]].faulted) {
            return true;
        }
    }
    return false;
}

BusErrorGuard::~BusErrorGuard() {
    for (int i = 0; i < n_slots_; ++i) {
        watched[slots_[i]].size = 0;
        watched[slots_[i]].base = 0;
    }
}

// ---------------------------------------------------------------- SIGINT

namespace {

std::atomic<void (*)(void*)> interrupt_stop{nullptr};
std::atomic<void*> interrupt_argument{nullptr};
struct sigaction interrupt_before;

void on_interrupt(int signal, siginfo_t* info, void* context) {
    if (void (*stop)(void*) = interrupt_stop.load()) {
        stop(interrupt_argument.load());
    }
    if ((interrupt_before.sa_flags & SA_SIGINFO) != 0) {
        interrupt_before.sa_sigaction(signal, info, context);
    } else {
        interrupt_before.sa_handler(signal);
    }
}

}  // namespace

InterruptWatch::InterruptWatch(void (*stop)(void*), void* argument) {
    if (interrupt_stop.load() != nullptr || ::sigaction(SIGINT, nullptr, &interrupt_before) != 0 ||
        ((interrupt_before.sa_flags & SA_SIGINFO) == 0 &&
         (interrupt_before.sa_handler == SIG_IGN || interrupt_before.sa_handler == SIG_DFL))) {
        return;
    }
    interrupt_argument = argument;
    interrupt_stop = stop;
    struct sigaction action{};
    action.sa_sigaction = on_interrupt;
    action.sa_flags = SA_SIGINFO | (interrupt_before.sa_flags & (SA_ONSTACK | SA_RESTART));
    action.sa_mask = interrupt_before.sa_mask;
    ::sigaction(SIGINT, &action, nullptr);
    watches_ = true;
}

InterruptWatch::~InterruptWatch() {
    if (watches_) {
        ::sigaction(SIGINT, &interrupt_before, nullptr);
        interrupt_stop = nullptr;
    }
}

}  // namespace edgemoe
