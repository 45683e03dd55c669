// What ends a process, tried in a child of its own.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "check.h"

// How a forked child that runs `body` ends, as waitpid tells it. A child that hangs is ended by SIGALRM.
template <typename Body>
int status_of_child(const Body& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(20);
        ::close(STDERR_FILENO);  // a sanitizer's report about the wanted crash is no news
        body();
        ::_exit(0);
    }
    int status = 0;
    CHECK_EQUAL(::waitpid(child, &status, 0), child);
    return status;
}

inline bool survived(int status) { return WIFEXITED(status) && WEXITSTATUS(status) == 0; }
inline bool hung(int status) { return WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM; }
