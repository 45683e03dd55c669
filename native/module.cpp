// edgemoe._native: the Python face of the store, the buffer type and the hook. No logic lives here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <stdexcept>

#include "expert_buffer.h"
#include "expert_store.h"
#include "forced_routes.h"
#include "ggml_abi.h"
#include "router_hook.h"
#include "signals.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Symbols = std::map<std::string, uintptr_t>;

template <typename Function>
void resolve(Function& function, const Symbols& symbols, const char* name) {
    const auto found = symbols.find(name);
    if (found == symbols.end() || found->second == 0) {
        throw std::invalid_argument(std::string("no address was given for ") + name);
    }
    function = reinterpret_cast<Function>(found->second);
}

edgemoe::ggml::Api make_api(const Symbols& symbols) {
    edgemoe::ggml::Api api{};
    resolve(api.buffer_init, symbols, "ggml_backend_buffer_init");
    resolve(api.nbytes, symbols, "ggml_nbytes");
    resolve(api.init, symbols, "ggml_init");
    resolve(api.free, symbols, "ggml_free");
    resolve(api.new_tensor_3d, symbols, "ggml_new_tensor_3d");
    resolve(api.mul_mat_id, symbols, "ggml_mul_mat_id");
    resolve(api.get_rows, symbols, "ggml_get_rows");
    resolve(api.set_name, symbols, "ggml_set_name");
    resolve(api.row_size, symbols, "ggml_row_size");
    resolve(api.type_traits, symbols, "ggml_get_type_traits_cpu");
    resolve(api.custom_4d, symbols, "ggml_custom_4d");
    resolve(api.memory_breakdown, symbols, "llama_get_memory_breakdown");
    const std::string wrong = api.check_layout();
    if (!wrong.empty()) {
        throw std::runtime_error("ggml's data layout differs in: " + wrong);
    }
    return api;
}

// A [n_rows, n_columns] array that owns the vector's memory.
template <typename Number>
nb::ndarray<nb::numpy, Number> as_array(std::vector<Number> numbers, int64_t n_columns) {
    auto* owned = new std::vector<Number>(std::move(numbers));
    const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<Number>*>(p); });
    const auto columns = static_cast<size_t>(n_columns);
    return nb::ndarray<nb::numpy, Number>(owned->data(), {columns > 0 ? owned->size() / columns : 0, columns}, owner);
}

using Ids = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // [n_tokens, n_layer, n_used]
using Predictions = nb::ndarray<const int32_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;  // [n_ahead, as the ids]

template <typename Array>
std::vector<int32_t> as_vector(const Array& ids) {
    return {ids.data(), ids.data() + ids.size()};
}

int64_t n_used(const Ids& ids) { return static_cast<int64_t>(ids.shape(2)); }

edgemoe::Io parse_io(const std::string& io) {
    if (io == "direct") {
        return edgemoe::Io::direct;
    }
    if (io == "mmap") {
        return edgemoe::Io::mmap;
    }
    if (io == "pread") {
        return edgemoe::Io::pread;
    }
    throw std::invalid_argument("io is direct, mmap or pread, not " + io);
}

// What one loaded model needs, in the order in which it must be taken down.
struct Session {
    Session(const std::string& io, int n_lanes, uint64_t read_bytes, uint64_t arena_bytes, edgemoe::Tuning tuning)
        : store(parse_io(io), n_lanes, arena_bytes, tuning, read_bytes) {}

    void attach(const Symbols& symbols) {
        api = make_api(symbols);
        buffer = std::make_unique<edgemoe::ExpertBuffer>(store, api);
        hook = std::make_unique<edgemoe::RouterHook>(store, *buffer, api);
    }

    Session& attached() {
        if (!hook) {
            throw std::runtime_error("the session is not attached to llama.cpp");
        }
        return *this;
    }

    edgemoe::ggml::Api api{};
    edgemoe::ExpertStore store;
    std::unique_ptr<edgemoe::ExpertBuffer> buffer;
    std::unique_ptr<edgemoe::RouterHook> hook;
    std::unique_ptr<edgemoe::InterruptWatch> watch;

    // Only stores to atomics: it is called from a signal handler too.
    void interrupt() {
        if (hook) {
            buffer->interrupt();
            hook->interrupt();
        }
    }
};

}  // namespace

NB_MODULE(_native, m) {
    // A thread that still runs when the program ends keeps its objects; the system takes them.
    nb::set_leak_warnings(false);
    nb::class_<edgemoe::StoreStats>(m, "Stats")
        .def_ro("hits", &edgemoe::StoreStats::hits)
        .def_ro("misses", &edgemoe::StoreStats::misses)
        .def_ro("evictions", &edgemoe::StoreStats::evictions)
        .def_ro("bytes_read", &edgemoe::StoreStats::bytes_read)
        .def_ro("dense_bytes", &edgemoe::StoreStats::dense_bytes)
        .def_ro("arena_bytes", &edgemoe::StoreStats::arena_bytes)
        .def_ro("resident_bytes", &edgemoe::StoreStats::resident_bytes)
        .def_ro("peak_bytes", &edgemoe::StoreStats::peak_bytes)
        .def_ro("expected_hits", &edgemoe::StoreStats::expected_hits)
        .def_ro("read_ns", &edgemoe::StoreStats::read_ns)
        .def_ro("busy_ns", &edgemoe::StoreStats::busy_ns)
        .def_ro("expected_bytes", &edgemoe::StoreStats::expected_bytes)
        .def_ro("wasted_bytes", &edgemoe::StoreStats::wasted_bytes)
        .def_ro("retries", &edgemoe::StoreStats::retries);

    nb::class_<edgemoe::SkipCounts>(m, "SkipCounts")
        .def_ro("routed_slots", &edgemoe::SkipCounts::routed_slots)
        .def_ro("skipped_slots", &edgemoe::SkipCounts::skipped_slots)
        .def_ro("routed_layers", &edgemoe::SkipCounts::routed_layers)
        .def_ro("skipped_mass", &edgemoe::SkipCounts::skipped_mass);

    nb::class_<Session>(m, "Session")
        .def(
            "__init__",
            [](Session* self, const std::string& io, int n_lanes, uint64_t read_bytes, uint64_t arena_bytes,
               bool recycle, bool overlap, bool look_ahead, bool forecast) {
                new (self) Session(io, n_lanes, read_bytes, arena_bytes, {recycle, overlap, look_ahead, forecast});
            },
            "io"_a, "n_lanes"_a, "read_bytes"_a, "arena_bytes"_a, "recycle"_a = true, "overlap"_a = true,
            "look_ahead"_a = true, "forecast"_a = true)
        .def(
            "add_file", [](Session& s, const std::string& path) { return s.store.add_file(path); }, "path"_a)
        .def(
            "add_tensor",
            [](Session& s, std::string name, int file, uint64_t offset, uint64_t n_bytes, int layer, int n_expert,
               uint64_t row_bytes, uint64_t most_bytes) {
                return s.store.add_tensor(
                    {std::move(name), file, offset, n_bytes, layer, n_expert, row_bytes, most_bytes});
            },
            "name"_a, "file"_a, "offset"_a, "n_bytes"_a, "layer"_a = -1, "n_expert"_a = 0, "row_bytes"_a = 0,
            "most_bytes"_a = 0)
        .def("attach", &Session::attach, "symbols"_a)
        .def("buffer_type", [](Session& s) { return reinterpret_cast<uintptr_t>(s.attached().buffer->type()); })
        .def("restore_names", [](Session& s) { s.attached().buffer->restore_names(); })
        .def("load_failure", [](Session& s) { return s.buffer ? s.buffer->failure() : ""; })
        .def("eval_callback", [](Session&) { return reinterpret_cast<uintptr_t>(&edgemoe::RouterHook::on_node); })
        .def("abort_callback", [](Session&) { return reinterpret_cast<uintptr_t>(&edgemoe::RouterHook::on_abort); })
        .def("callback_data", [](Session& s) { return reinterpret_cast<uintptr_t>(s.attached().hook.get()); })
        .def(
            "begin",
            [](Session& s, int64_t position, int64_t n_tokens) { s.attached().hook->begin(position, n_tokens); },
            "position"_a, "n_tokens"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("interrupt", &Session::interrupt)
        .def("watch_interrupts",
             [](Session& s) {
                 s.watch.reset();
                 s.watch = std::make_unique<edgemoe::InterruptWatch>(
                     [](void* session) { static_cast<Session*>(session)->interrupt(); }, &s);
             })
        .def("ignore_interrupts", [](Session& s) { s.watch.reset(); })
        .def("interrupted", [](Session& s) { return s.attached().hook->interrupted(); })
        .def(
            "take_failure", [](Session& s) { return s.attached().hook->take_failure(); },
            nb::call_guard<nb::gil_scoped_release>())
        .def(
            "keep",
            [](Session& s, int layer, const std::vector<int32_t>& experts) { s.attached().hook->keep(layer, experts); },
            "layer"_a, "experts"_a)
        .def(
            "warm", [](Session& s, int layer, const std::vector<int32_t>& experts) { s.store.warm(layer, experts); },
            "layer"_a, "experts"_a, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "prefer",
            [](Session& s, int layer, const std::vector<int32_t>& experts) { s.store.prefer(layer, experts); },
            "layer"_a, "experts"_a)
        .def(
            "use_slots",
            [](Session& s, uint64_t spared_bytes, uint64_t lent_bytes) {
                s.store.use_slots(spared_bytes, lent_bytes);
                s.attached().hook->lend(lent_bytes);
            },
            "spared_bytes"_a = 0, "lent_bytes"_a = 0)
        .def("in_slots", [](Session& s) { return s.store.in_slots(); })
        .def("residents", [](Session& s) { return s.store.residents(); })
        .def(
            "force_routes",
            [](Session& s, std::vector<int> layers, const Ids& ids) {
                for (const int layer : layers) {
                    static_cast<void>(s.store.n_expert(layer));  // throws
                }
                s.attached().hook->routes().set(std::move(layers), as_vector(ids), n_used(ids));
            },
            "layers"_a, "ids"_a)
        .def(
            "force_predictions",
            [](Session& s, const Predictions& ids) { s.attached().hook->routes().set_predictions(as_vector(ids)); },
            "ids"_a)
        .def(
            "watch_routers",
            [](Session& s, const std::vector<int>& layers, bool outputs) { s.attached().hook->watch(layers, outputs); },
            "layers"_a, "outputs"_a = false)
        .def(
            "cut_after", [](Session& s, int layer) { s.attached().hook->cut_after(layer); }, "layer"_a)
        .def(
            "take_trace",
            [](Session& s, int layer) {
                edgemoe::LayerTrace trace = s.attached().hook->take_trace(layer);
                return nb::make_tuple(
                    as_array(std::move(trace.logits), trace.n_expert), as_array(std::move(trace.ids), trace.n_used),
                    as_array(std::move(trace.weights), trace.n_used), as_array(std::move(trace.norms), trace.n_used),
                    as_array(std::move(trace.change), 1));
            },
            "layer"_a)
        .def(
            "skip",
            [](Session& s, double mass, uint64_t cache_bytes) {
                s.attached().hook->skipping().bound(mass, cache_bytes);
            },
            "mass"_a, "cache_bytes"_a)
        .def("skip_counts", [](Session& s) { return s.hook ? s.hook->skipping().counts() : edgemoe::SkipCounts{}; })
        .def("staged_layers", [](Session& s) { return s.hook ? s.hook->staged_layers() : 0; })
        .def("stats", [](Session& s) { return s.store.stats(); });

    // Forces what a plain llama.cpp context routes to.
    nb::class_<edgemoe::RouteForcer>(m, "RouteForcer")
        .def(nb::init<>())
        .def(
            "force",
            [](edgemoe::RouteForcer& f, std::vector<int> layers, const Ids& ids) {
                f.force(std::move(layers), as_vector(ids), n_used(ids));
            },
            "layers"_a, "ids"_a)
        .def("eval_callback",
             [](edgemoe::RouteForcer&) { return reinterpret_cast<uintptr_t>(&edgemoe::RouteForcer::on_node); })
        .def("callback_data", [](edgemoe::RouteForcer& f) { return reinterpret_cast<uintptr_t>(&f); })
        .def("failure", &edgemoe::RouteForcer::failure);

    m.def(
        "probe_direct",
        [](const std::string& path, uint64_t offset) {
            std::string why;
            const bool works = edgemoe::ExpertStore::probe_direct(path, offset, why);
            return std::make_tuple(works, why);
        },
        "path"_a, "offset"_a);
    m.def(
        "memory_use",
        [](const Symbols& symbols, uintptr_t llama_context) {
            edgemoe::ggml::MemoryUse sum;
            for (const auto& entry : make_api(symbols).memory_breakdown(reinterpret_cast<const void*>(llama_context))) {
                sum.model += entry.second.model;
                sum.context += entry.second.context;
                sum.compute += entry.second.compute;
            }
            return std::make_tuple(sum.model, sum.context, sum.compute);
        },
        "symbols"_a, "llama_context"_a);
    m.def("forget_file", [](const std::string& path) { edgemoe::MappedFile(path).forget(0, 0); }, "path"_a);

    m.def("return_freed_memory", &edgemoe::return_freed_memory);

    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const edgemoe::SystemError& system_error) {
            PyErr_SetString(PyExc_OSError, system_error.what());
        }
    });
}
