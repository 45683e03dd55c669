// The few ggml declarations that edgemoe needs, for the llama.cpp inside llama-cpp-python 0.3.36.
//
// ggml's buffer-type interface is internal (ggml-backend-impl.h is not shipped), so its layout is declared here
// together with ggml_tensor. No ggml library is linked: Python hands over the addresses of the functions it finds
// in the libllama it has already loaded (a second copy of ggml in the process would be a different ggml).
// `check_layout` proves at run time, against that library, that these declarations are still true.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace edgemoe::ggml {

struct Buffer;
struct BufferType;
struct Context;

struct Tensor {  // ggml.h: struct ggml_tensor
    int type;
    Buffer* buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    Tensor* src[10];
    Tensor* view_src;
    size_t view_offs;
    void* data;
    char name[64];
    void* extra;
    char padding[8];
};

struct BufferTypeInterface {  // ggml-backend-impl.h: struct ggml_backend_buffer_type_i
    const char* (*get_name)(BufferType*);
    Buffer* (*alloc_buffer)(BufferType*, size_t size);
    size_t (*get_alignment)(BufferType*);
    size_t (*get_max_size)(BufferType*);
    size_t (*get_alloc_size)(BufferType*, const Tensor*);
    bool (*is_host)(BufferType*);
};

struct BufferType {  // struct ggml_backend_buffer_type
    BufferTypeInterface iface;
    void* device;
    void* context;
};

struct BufferInterface {  // struct ggml_backend_buffer_i
    void (*free_buffer)(Buffer*);
    void* (*get_base)(Buffer*);
    int (*init_tensor)(Buffer*, Tensor*);  // enum ggml_status
    void (*memset_tensor)(Buffer*, Tensor*, uint8_t value, size_t offset, size_t size);
    void (*set_tensor)(Buffer*, Tensor*, const void* data, size_t offset, size_t size);
    void (*get_tensor)(Buffer*, const Tensor*, void* data, size_t offset, size_t size);
    void* set_tensor_2d;
    void* get_tensor_2d;
    bool (*cpy_tensor)(Buffer*, const Tensor* src, Tensor* dst);
    void (*clear)(Buffer*, uint8_t value);
    void (*reset)(Buffer*);
};

struct Buffer {  // struct ggml_backend_buffer
    BufferInterface iface;
    BufferType* buft;
    void* context;
    size_t size;
    int usage;
};

struct InitParams {  // struct ggml_init_params
    size_t mem_size;
    void* mem_buffer;
    bool no_alloc;
};

using FromFloat = void (*)(const float* from, void* to, int64_t n);  // ggml_from_float_t
using VecDot = void (*)(int n, float* result, size_t, const void* x, size_t, const void* y, size_t, int n_columns);

struct TypeTraits {  // ggml-cpu.h: struct ggml_type_traits_cpu
    FromFloat from_float;
    VecDot vec_dot;
    int vec_dot_type;
    int64_t n_rows;
};

struct CustomOp {  // ggml-impl.h: struct ggml_custom_op_params
    void (*fun)(Tensor* node, int thread, int n_threads, void* userdata);
    int n_tasks;
    void* userdata;
};

struct MemoryUse {  // llama-ext.h: struct llama_memory_breakdown_data, bytes
    size_t model = 0;
    size_t context = 0;
    size_t compute = 0;
};

constexpr int kUsageCompute = 2;   // GGML_BACKEND_BUFFER_USAGE_COMPUTE
constexpr int kStatusFailed = -1;  // GGML_STATUS_FAILED
constexpr int kStatusSuccess = 0;
constexpr int kAllThreads = -1;  // GGML_N_TASKS_MAX

// Addresses inside the loaded libllama, by the name of the function.
struct Api {
    Buffer* (*buffer_init)(BufferType*, BufferInterface, void* context, size_t size);  // ggml_backend_buffer_init
    size_t (*nbytes)(const Tensor*);                                                   // ggml_nbytes
    Context* (*init)(InitParams);                                                      // ggml_init
    void (*free)(Context*);                                                            // ggml_free
    Tensor* (*new_tensor_3d)(Context*, int type, int64_t, int64_t, int64_t);           // ggml_new_tensor_3d
    Tensor* (*mul_mat_id)(Context*, Tensor* as, Tensor* b, Tensor* ids);               // ggml_mul_mat_id
    Tensor* (*get_rows)(Context*, Tensor* table, Tensor* rows);                        // ggml_get_rows
    Tensor* (*set_name)(Tensor*, const char*);                                         // ggml_set_name
    size_t (*row_size)(int type, int64_t n);                                           // ggml_row_size
    const TypeTraits* (*type_traits)(int type);                                        // ggml_get_type_traits_cpu
    Tensor* (*custom_4d)(Context*, int type, int64_t, int64_t, int64_t, int64_t, Tensor** args, int n_args,
                         decltype(CustomOp::fun), int n_tasks, void* userdata);       // ggml_custom_4d
    std::map<BufferType*, MemoryUse> (*memory_breakdown)(const void* llama_context);  // llama_get_memory_breakdown

    // enum ggml_op is not part of the ABI above: learnt by check_layout.
    int op_none = -1, op_mul_mat_id = -1, op_get_rows = -1, op_custom = -1;

    // Builds a few tensors with the library and compares every field that edgemoe touches.
    // Returns what differs, or an empty string.
    std::string check_layout();
};

}  // namespace edgemoe::ggml
