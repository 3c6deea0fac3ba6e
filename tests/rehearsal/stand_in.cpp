// CUDA devices for torch's CPU build: an operation on them runs the CPU's kernel on the same memory.
//
// Tensors say `cuda:N`, values are real. Tensors of different devices in one operation raise, as on
// a GPU. Counted are operations, copies between host and device, reads by the host, and what
// reaches attention. No CUDA library is needed. See stand_in.py for the Python side.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::Storage;

namespace {

constexpr DeviceIndex kDevices = 8;
thread_local DeviceIndex current_device = 0;

// ---- Counters ----

std::mutex counters_lock;
std::map<std::string, long> counters;
std::atomic<long> allocated_bytes{0}, peak_bytes{0};

void count(const std::string& what) {
  std::lock_guard<std::mutex> guard(counters_lock);
  ++counters[what];
}

Device with_index(Device device) {
  return {DeviceType::CUDA, device.has_index() ? device.index() : current_device};
}

// ---- Device, streams and events: everything is done when a call returns ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return {DeviceType::CUDA, current_device}; }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, with_index(device));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  void record(void** event, const c10::Stream&, const DeviceIndex,
              const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void synchronizeStream(const c10::Stream&) const override { count("sync"); }
  void synchronizeEvent(void*) const override { count("sync"); }
  void synchronizeDevice(const DeviceIndex) const override { count("sync"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// ---- Pinned memory ----

std::mutex pinned_lock;
std::map<const char*, size_t> pinned_blocks;  // start, bytes

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  const char* p = static_cast<const char*>(address);
  auto after = pinned_blocks.upper_bound(p);
  if (after == pinned_blocks.begin()) return false;
  auto block = std::prev(after);
  return p < block->first + block->second;
}

struct PinnedAllocator final : c10::Allocator {
  static void release(void* p) {
    {
      std::lock_guard<std::mutex> guard(pinned_lock);
      pinned_blocks.erase(static_cast<char*>(p));
    }
    std::free(p);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* p = nullptr;
    TORCH_CHECK(posix_memalign(&p, 4096, bytes ? bytes : 1) == 0, "out of memory");
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks[static_cast<char*>(p)] = bytes;
    return {p, p, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
PinnedAllocator pinned_allocator;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    DeviceIndex before = ::current_device;
    if (index >= 0) ::current_device = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  void deviceSynchronize(DeviceIndex) const override { count("sync"); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

// ---- One memory, two devices ----

struct Lease {
  Storage storage;
  long bytes;  // of the device's memory; 0 for an alias on the host
};

void release_lease(void* p) {
  auto* lease = static_cast<Lease*>(p);
  allocated_bytes -= lease->bytes;
  delete lease;
}

// The memory of `storage`, as a storage of another device.
Storage on_device(const Storage& storage, Device device) {
  long bytes = device.is_cuda() ? static_cast<long>(storage.nbytes()) : 0;
  long now = allocated_bytes += bytes, peak = peak_bytes;
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {}
  c10::DataPtr data(storage.mutable_data(), new Lease{storage, bytes}, &release_lease, device);
  return Storage(Storage::use_byte_size_t{}, storage.nbytes(), std::move(data),
                 c10::GetCPUAllocator(), /*resizable=*/true);
}

Tensor with_storage(Storage storage, const Tensor& like, DispatchKey key) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                       c10::DispatchKeySet(key), like.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return out;
}

Tensor host_alias(const Tensor& t) {
  if (!t.is_cuda()) return t;
  return with_storage(on_device(t.storage(), Device(DeviceType::CPU)), t, DispatchKey::CPU);
}

// The operands of one operation: lowered to aliases on the host, its results lifted back.
class Operands {
 public:
  explicit Operands(std::string name) : name_(std::move(name)) {}

  bool any_cuda = false, any_host = false;
  Device device{DeviceType::CUDA, current_device};

  Tensor lower(const Tensor& t) {
    if (!t.defined()) return t;
    if (!t.is_cuda()) {
      any_host = any_host || t.dim() > 0;  // scalars may be anywhere
      return t;
    }
    TORCH_CHECK(!any_cuda || t.device() == device, "Expected all tensors to be on the same device, "
                "but found at least two devices, ", device, " and ", t.device(), " (", name_, ")");
    any_cuda = true;
    device = t.device();
    for (auto& known : tensors_)
      if (known.first.is_same(t)) return known.second;
    Storage host;
    for (auto& known : storages_)
      if (known.first.is_alias_of(t.storage())) host = known.second;
    if (!host) {
      host = on_device(t.storage(), Device(DeviceType::CPU));
      storages_.emplace_back(t.storage(), host);
    }
    tensors_.emplace_back(t, with_storage(host, t, DispatchKey::CPU));
    return tensors_.back().second;
  }

  Tensor lift(const Tensor& t) const {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& known : tensors_)
      if (known.second.is_same(t)) return known.first;
    for (auto& known : storages_)
      if (known.second.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return with_storage(known.first, t, DispatchKey::CUDA);  // a view of an operand
    return with_storage(on_device(t.storage(), device), t, DispatchKey::CUDA);
  }

  // What the operation changed of an operand itself: `resize_`, `set_`, `out=`.
  void update_resized() const {
    for (auto& [original, alias] : tensors_) {
      if (alias.storage().data() != original.storage().data() ||
          alias.storage().nbytes() != original.storage().nbytes())
        original.unsafeGetTensorImpl()->set_storage_keep_dtype(
            on_device(alias.storage(), device));
      if (alias.sizes() != original.sizes() || alias.strides() != original.strides() ||
          alias.storage_offset() != original.storage_offset())
        original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(),
                                                              alias.storage_offset());
    }
  }

  // Tensors of a value of any nesting, mapped.
  template <typename Map>
  static IValue mapped(const IValue& value, const Map& map) {
    if (value.isTensor()) return map(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> out;
      for (const auto& t : value.toTensorVector()) out.push_back(map(t));
      return out;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> out;
      for (const auto& t : value.toOptionalTensorVector())
        out.push_back(t ? std::optional<Tensor>(map(*t)) : std::nullopt);
      return out;
    }
    if (value.isList() && !value.toList().empty() &&
        IValue(value.toList().get(0)).isTensorList()) {  // collectives
      c10::List<std::vector<Tensor>> out;
      for (const IValue& inner : value.toList())
        out.push_back(mapped(inner, map).toTensorVector());
      return out;
    }
    return value;
  }

 private:
  std::string name_;
  std::vector<std::pair<Tensor, Tensor>> tensors_;    // original, alias on the host
  std::vector<std::pair<Storage, Storage>> storages_;
};

const std::set<std::string> kTakesHostIndices = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};
// Operations whose result's size, or whose result, the host must know.
const std::set<std::string> kReads = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::bincount", "aten::is_nonzero"};
const std::set<std::string> kProducts = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution",
    "aten::convolution_backward", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward"};

bool starts_kernel(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (!result.alias_info() || result.alias_info()->isWrite()) return true;
  return schema.returns().empty();
}

const Tensor* first_tensor(const torch::jit::Stack& stack, size_t begin) {
  for (size_t i = begin; i < stack.size(); ++i)
    if (stack[i].isTensor() && stack[i].toTensor().defined()) return &stack[i].toTensor();
  return nullptr;
}

// Any operation on CUDA tensors that has no function of its own below.
void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast_dispatch_keyset);
  const auto& schema = op.schema();
  const std::string name = schema.operator_name().name;
  const bool collective = name.rfind("c10d::", 0) == 0;
  const size_t begin = stack->size() - schema.arguments().size();

  if (kReads.count(name)) count("read:" + name);
  if (kProducts.count(name))
    count("product:" + name.substr(6) + ":" +
          c10::toString(first_tensor(*stack, begin)->scalar_type()));
  if (starts_kernel(schema) && !collective) count("operation:" + name);

  Operands operands(name);
  auto lower = [&](const Tensor& t) { return operands.lower(t); };
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      operands.device = with_index(value.toDevice());
      value = Device(DeviceType::CPU);
    } else {
      value = Operands::mapped(value, lower);
    }
  }
  TORCH_CHECK(!(operands.any_cuda && operands.any_host) || kTakesHostIndices.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              operands.device, " and cpu! (", name, ")");
  if (collective) {
    const Tensor* t = nullptr;
    std::vector<Tensor> all;
    for (size_t i = begin; i < stack->size(); ++i)
      Operands::mapped((*stack)[i], [&](const Tensor& each) { all.push_back(each); return each; });
    for (auto& each : all)
      if (!t || each.numel() > t->numel()) t = &each;
    if (t) {
      std::ostringstream key;
      key << "collective:" << name.substr(6) << ":" << c10::toString(t->scalar_type()) << ":"
          << t->nbytes();
      count(key.str());
    }
  }
  op.callBoxed(*stack);
  operands.update_resized();
  auto lift = [&](const Tensor& t) { return operands.lift(t); };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    (*stack)[i] = Operands::mapped((*stack)[i], lift);
}

// ---- Operations with a function of their own ----

Tensor lifted(const Tensor& host, std::optional<Device> device) {
  Device where = with_index(device.value_or(Device(DeviceType::CUDA, current_device)));
  return with_storage(on_device(host.storage(), where), host, DispatchKey::CUDA);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lifted(at::empty(size, at::TensorOptions().dtype(dtype).device(at::kCPU), format), device);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lifted(at::empty_strided(size, stride, at::TensorOptions().dtype(dtype).device(at::kCPU)),
                device);
}

// The host waits for a copy that is blocking, or from or to memory that is not pinned.
Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (to.is_cuda() && from.is_cuda()) {
    count("operation:aten::copy_");
  } else {
    const Tensor& host = to.is_cuda() ? from : to;
    bool waits = !(non_blocking && host.numel() && is_pinned(host.storage().data()));
    std::string way = to.is_cuda() ? "to_device:" : "to_host:";
    count(way + (waits ? "blocking:" + std::to_string(host.nbytes()) : "async"));
  }
  Tensor target = host_alias(to), source = host_alias(from);
  target.copy_(source);
  return to;
}

Tensor& set_source(Tensor& self, const Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// Notes what attention is given, and picks the math kernel where torch would have to on a GPU.
int64_t fused_sdp_choice(const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& mask, double, bool, std::optional<double>,
                         bool) {
  std::ostringstream key;
  key << "attention:dtype=" << c10::toString(q.scalar_type()) << " tokens=" << q.size(-2)
      << " head=" << q.size(-1) << " qkv_stride=" << q.stride(-1);
  const bool biased = mask && mask->defined();
  if (biased)
    key << " mask_stride=" << mask->stride(-1) << " mask_dims=" << mask->dim()
        << " mask_grad=" << mask->requires_grad() << " mask_dtype="
        << c10::toString(mask->scalar_type());
  count(key.str());
  const int64_t math = 0, efficient = 2;
  return biased && mask->stride(-1) != 1 ? math : efficient;
}

// The memory-efficient kernel, which exists for GPUs only, by its formula in fp32.
Tensor attention_weights(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias,
                         std::optional<double> scale) {
  double by = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
  Tensor logits = q.to(at::kFloat).matmul(k.to(at::kFloat).mT()) * by;
  if (bias && bias->defined()) logits = logits + bias->to(at::kFloat);
  return logits.softmax(-1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias, bool,
    double, bool, std::optional<double> scale) {
  Tensor out = attention_weights(q, k, bias, scale).matmul(v.to(at::kFloat)).to(q.scalar_type());
  Tensor none = at::zeros({}, at::kLong);
  // In the layout of the kernel's result: (B, N, H, K).
  return {out.transpose(1, 2).contiguous().transpose(1, 2), at::zeros({1}), none, none.clone()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
    const Tensor& out, const Tensor&, const Tensor&, const Tensor&, double,
    std::array<bool, 4> wanted, bool, std::optional<double> scale) {
  if (!grad.defined()) return {};
  double by = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
  Tensor weights = attention_weights(q, k, bias, scale), g = grad.to(at::kFloat);
  Tensor to_weights = g.matmul(v.to(at::kFloat).mT());
  Tensor to_logits = weights * (to_weights - (to_weights * weights).sum(-1, true));
  auto dtype = q.scalar_type();
  Tensor to_bias;
  if (wanted[3] && bias.defined()) to_bias = to_logits.to(bias.scalar_type());
  return {(to_logits.matmul(k.to(at::kFloat)) * by).to(dtype),
          (to_logits.mT().matmul(q.to(at::kFloat)) * by).to(dtype), weights.mT().matmul(g).to(dtype),
          to_bias};
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Tensor", set_source);
  // Composite functions, which would choose an implementation by the device.
  for (const char* name : {"convolution", "_convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_scaled_dot_product_efficient_attention", efficient_attention);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_attention_backward);
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"send", "recv_", "recv_any_source_", "reduce_", "broadcast_", "allreduce_",
        "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_",
        "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

extern "C" {

int stand_in_install() {
  static Guard guard;
  c10::impl::registerDeviceGuard(DeviceType::CUDA, &guard);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&fused_sdp_choice);
  return at::detail::getCUDAHooks().hasCUDA();
}

int stand_in_device() { return current_device; }
void stand_in_set_device(int index) { current_device = static_cast<DeviceIndex>(index); }
long stand_in_allocated() { return allocated_bytes; }
long stand_in_peak() { return peak_bytes; }
void stand_in_reset_peak() { peak_bytes = allocated_bytes.load(); }
void stand_in_count(const char* what) { count(what); }

void stand_in_reset() {
  std::lock_guard<std::mutex> guard(counters_lock);
  counters.clear();
}

// Lines "name<TAB>number", cut at `size`; returns the length of the whole.
int stand_in_counters(char* out, int size) {
  std::lock_guard<std::mutex> guard(counters_lock);
  std::string text;
  for (auto& [name, number] : counters) text += name + "\t" + std::to_string(number) + "\n";
  std::strncpy(out, text.c_str(), size - 1);
  out[size - 1] = 0;
  return static_cast<int>(text.size());
}

}  // extern "C"
