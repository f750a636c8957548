//! The CUDA driver, as far as this crate calls it: functions that are looked up before they are called,
//! and handles that clean up after themselves.
//!
//! cudarc gives the types and loads the library; its own functions panic where a library lacks one, and
//! answer an enum, which must not hold the codes that a newer driver may answer. So every function is
//! looked up here, by the type that cudarc declares for it, and answers a number.
//!
//! The bindings are those of CUDA 12.4, the lowest minor version whose NVRTC the kernels are compiled with.
//! Nothing here depends on what other versions lay out differently: a tensor map has 128 bytes in all of
//! them and is aligned to 128 as 13.x asks (12.x: 64); the rest are numbers, opaque handles, and the launch
//! configuration, which is the same since 11.8.
#![allow(unsafe_code)]

use crate::{
    error::{Error, NoDevice, Result},
    launch::Geometry,
};
use cudarc::driver::sys;
use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void},
    path::PathBuf,
    ptr::null_mut,
    sync::Arc,
    time::Duration,
};

// Why the `unsafe` of this file is sound, by kind of use:
//
// * `load`: the names are those of the driver API, and the constant in `api!` holds each type against
//   cudarc's declaration. A library stays loaded until the process ends.
// * `call!`: pointers are to live locals or to memory whose length is passed along; handles come from the
//   driver, are kept in one place each, and are destroyed once, in `Drop`. Every handle holds its context,
//   which is bound before the call. What a copy or a kernel reads and writes later, without the driver
//   knowing, lives until the stream is synchronised: `Staging` and `Buffer` say how.
// * `Send`: a handle may be used on any thread to which its context is bound; what is not safe to use on two
//   at once (streams, graphs) is reached through `&mut` of the device alone.

/// What a function of the driver answers.
type Code = u32;

const SUCCESS: Code = 0;
const OUT_OF_MEMORY: Code = 2;
const STUB_LIBRARY: Code = 34;
const NO_DEVICE: Code = 100;
const UNSUPPORTED_PTX: Code = 222;

macro_rules! api {
    ($($name:ident($($argument:ty),*), $since:expr;)*) => {
        /// The functions of the driver; `None` where it lacks one.
        #[allow(non_snake_case)]
        struct Api {
            $($name: Option<unsafe extern "C" fn($($argument),*) -> Code>,)*
        }

        // cudarc declares the same types.
        const _: () = {
            $(let _: unsafe fn($($argument),*) -> sys::CUresult = sys::$name;)*
        };

        impl Api {
            fn load() -> Api {
                Api { $($name: lookup(stringify!($name)),)* }
            }

            /// The first function that is missing of those that every plan needs.
            fn missing(&self) -> Option<NoDevice> {
                $(if self.$name.is_none() && $since <= NEEDED {
                    return Some(NoDevice::NoFunction { name: stringify!($name), since: $since.max(NEEDED) });
                })*
                None
            }
        }

        /// The CUDA version that brought a function.
        fn since(name: &str) -> (u32, u32) {
            match name {
                $(stringify!($name) => $since,)*
                _ => NEEDED,
            }
        }
    };
}

/// The oldest CUDA version whose drivers can run a plan; functions that are newer serve kernels with
/// clusters or tensor maps, which need newer drivers anyway.
const NEEDED: (u32, u32) = (11, 4);

api! {
    cuInit(c_uint), (2, 0);
    cuDriverGetVersion(*mut c_int), (2, 2);
    cuDeviceGetCount(*mut c_int), (2, 0);
    cuDeviceGet(*mut sys::CUdevice, c_int), (2, 0);
    cuDeviceGetName(*mut c_char, c_int, sys::CUdevice), (2, 0);
    cuDeviceGetAttribute(*mut c_int, sys::CUdevice_attribute, sys::CUdevice), (2, 0);
    cuDeviceTotalMem_v2(*mut usize, sys::CUdevice), (3, 2);
    cuDevicePrimaryCtxRetain(*mut sys::CUcontext, sys::CUdevice), (7, 0);
    cuDevicePrimaryCtxRelease_v2(sys::CUdevice), (11, 0);
    cuCtxSetCurrent(sys::CUcontext), (4, 0);
    cuMemGetInfo_v2(*mut usize, *mut usize), (3, 2);
    cuMemAlloc_v2(*mut sys::CUdeviceptr, usize), (3, 2);
    cuMemFree_v2(sys::CUdeviceptr), (3, 2);
    cuMemAllocHost_v2(*mut *mut c_void, usize), (3, 2);
    cuMemFreeHost(*mut c_void), (2, 0);
    cuMemcpyHtoDAsync_v2(sys::CUdeviceptr, *const c_void, usize, sys::CUstream), (3, 2);
    cuMemcpyDtoHAsync_v2(*mut c_void, sys::CUdeviceptr, usize, sys::CUstream), (3, 2);
    cuMemcpyDtoDAsync_v2(sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream), (3, 2);
    cuMemsetD8Async(sys::CUdeviceptr, u8, usize, sys::CUstream), (3, 2);
    cuStreamCreate(*mut sys::CUstream, c_uint), (2, 0);
    cuStreamDestroy_v2(sys::CUstream), (4, 0);
    cuStreamSynchronize(sys::CUstream), (2, 0);
    cuStreamBeginCapture_v2(sys::CUstream, sys::CUstreamCaptureMode), (10, 1);
    cuStreamEndCapture(sys::CUstream, *mut sys::CUgraph), (10, 0);
    cuGraphInstantiateWithFlags(*mut sys::CUgraphExec, sys::CUgraph, c_ulonglong), (11, 4);
    cuGraphLaunch(sys::CUgraphExec, sys::CUstream), (10, 0);
    cuGraphExecDestroy(sys::CUgraphExec), (10, 0);
    cuGraphDestroy(sys::CUgraph), (10, 0);
    cuEventCreate(*mut sys::CUevent, c_uint), (2, 0);
    cuEventRecord(sys::CUevent, sys::CUstream), (2, 0);
    cuEventElapsedTime(*mut f32, sys::CUevent, sys::CUevent), (2, 0);
    cuEventDestroy_v2(sys::CUevent), (4, 0);
    cuModuleLoadDataEx(*mut sys::CUmodule, *const c_void, c_uint, *mut sys::CUjit_option, *mut *mut c_void), (2, 1);
    cuModuleUnload(sys::CUmodule), (2, 0);
    cuModuleGetFunction(*mut sys::CUfunction, sys::CUmodule, *const c_char), (2, 0);
    cuFuncGetAttribute(*mut c_int, sys::CUfunction_attribute, sys::CUfunction), (2, 2);
    cuFuncSetAttribute(sys::CUfunction, sys::CUfunction_attribute, c_int), (9, 0);
    cuLaunchKernel(
        sys::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, sys::CUstream,
        *mut *mut c_void, *mut *mut c_void
    ), (4, 0);
    cuLaunchKernelEx(*const sys::CUlaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void), (11, 8);
    cuTensorMapEncodeTiled(
        *mut sys::CUtensorMap, sys::CUtensorMapDataType, u32, *mut c_void, *const u64, *const u64, *const u32,
        *const u32, sys::CUtensorMapInterleave, sys::CUtensorMapSwizzle, sys::CUtensorMapL2promotion,
        sys::CUtensorMapFloatOOBfill
    ), (12, 0);
}

/// A function of the driver's library.
fn lookup<F: Copy>(name: &str) -> Option<F> {
    // SAFETY: see the top of the file; the caller has seen that the library is there.
    unsafe { sys::culib().get::<F>(name).ok().map(|f| *f) }
}

/// Whether NVRTC is installed.
pub(super) fn has_nvrtc() -> bool {
    // SAFETY: as for the driver's library.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}

/// The file that the driver's library was loaded from, where the system tells.
pub(super) fn library() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let path = |line: &str| Some(PathBuf::from(line.get(line.find('/')?..)?));
    let is_driver =
        |p: &PathBuf| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with("libcuda.so"));
    maps.lines().filter_map(path).find(is_driver)
}

/// Calls a function of the driver; an error holds its name.
macro_rules! call {
    ($driver:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let driver: &Driver = $driver;
        match driver.api.$name {
            // SAFETY: see the top of the file.
            #[allow(clippy::macro_metavars_in_unsafe)]
            Some(function) => driver.answer(stringify!($name), unsafe { function($($argument),*) }),
            None => Err(Failure { call: stringify!($name), code: Code::MAX, name: "missing".into() }),
        }
    }};
}

/// A call that the driver refused.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    call: &'static str,
    code: Code,
    name: String,
}

impl Failure {
    /// Its code, by name.
    pub(super) fn name(&self) -> String {
        if self.code == Code::MAX {
            let (major, minor) = since(self.call);
            return format!("it lacks {}, drivers for CUDA {major}.{minor} have it", self.call);
        }
        format!("{} {}", self.name, self.code)
    }

    pub(super) fn is_out_of_memory(&self) -> bool {
        self.code == OUT_OF_MEMORY
    }

    pub(super) fn is_unsupported_ptx(&self) -> bool {
        self.code == UNSUPPORTED_PTX
    }

    /// Whether the context is lost: every later call fails as well.
    pub(super) fn is_lasting(&self) -> bool {
        // Uncorrectable memory errors, illegal addresses, timeouts, assertions, and whatever else ends a
        // kernel; CUDA_ERROR_UNKNOWN has no other cause that is known.
        matches!(self.code, 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 999)
    }
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Error {
        match f.code {
            Code::MAX => Error::NoDevice(NoDevice::NoFunction { name: f.call, since: since(f.call) }),
            code => Error::Driver { call: f.call, code, name: f.name },
        }
    }
}

type Answer<T = ()> = Result<T, Failure>;

/// The driver's library, started.
pub(super) struct Driver {
    api: Api,
}

/// A GPU, as the driver describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Its memory, bytes.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory that one block may ask for, bytes.
    pub shared: u32,
    /// Level-2 cache, bytes.
    pub l2: u64,
    /// Clock of the multiprocessors, Hz.
    pub clock: u64,
}

impl Driver {
    /// Loads and starts it.
    pub(super) fn start() -> Result<Arc<Driver>, NoDevice> {
        // SAFETY: to look for the library runs its initialisers, as every program that uses the GPU does.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDevice::NoLibrary);
        }
        let driver = Driver { api: Api::load() };
        if driver.api.cuInit.is_none() {
            return Err(NoDevice::NoFunction { name: "cuInit", since: NEEDED });
        }
        match call!(&driver, cuInit(0)) {
            Ok(()) => driver.api.missing().map_or(Ok(Arc::new(driver)), Err),
            Err(f) => Err(match f.code {
                STUB_LIBRARY => NoDevice::Stub,
                NO_DEVICE => NoDevice::NoGpu,
                _ => NoDevice::NoStart { code: f.name() },
            }),
        }
    }

    fn answer(&self, call: &'static str, code: Code) -> Answer {
        if code == SUCCESS { Ok(()) } else { Err(Failure { call, code, name: self.name(code) }) }
    }

    /// The name of a code.
    fn name(&self, code: Code) -> String {
        type GetErrorName = unsafe extern "C" fn(Code, *mut *const c_char) -> Code;
        let mut name: *const c_char = std::ptr::null();
        let Some(get) = lookup::<GetErrorName>("cuGetErrorName") else { return "CUDA error".into() };
        // SAFETY: a call as at the top of the file; the name is a constant of the library.
        unsafe {
            if get(code, &mut name) != SUCCESS || name.is_null() {
                return "CUDA error".into();
            }
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }

    /// The CUDA version that it serves.
    pub(super) fn version(&self) -> Answer<(u32, u32)> {
        let mut version = 0;
        call!(self, cuDriverGetVersion(&mut version))?;
        let version = version.unsigned_abs();
        Ok((version / 1000, version % 1000 / 10))
    }

    /// How many GPUs it sees.
    pub(super) fn count(&self) -> Answer<usize> {
        let mut count = 0;
        call!(self, cuDeviceGetCount(&mut count))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// What a GPU is.
    pub(super) fn gpu(&self, ordinal: usize) -> Answer<Gpu> {
        use sys::CUdevice_attribute_enum as A;
        let device = self.device(ordinal)?;
        let mut name = [0u8; 256];
        call!(self, cuDeviceGetName(name.as_mut_ptr().cast(), 255, device))?;
        let mut memory = 0;
        call!(self, cuDeviceTotalMem_v2(&mut memory, device))?;
        let attribute = |what| {
            let mut value = 0;
            call!(self, cuDeviceGetAttribute(&mut value, what, device))?;
            Ok::<u32, Failure>(u32::try_from(value).unwrap_or(0))
        };
        Ok(Gpu {
            name: CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned(),
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            memory: memory as u64,
            sms: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            l2: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
            clock: 1000 * u64::from(attribute(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?),
        })
    }

    fn device(&self, ordinal: usize) -> Answer<sys::CUdevice> {
        let mut device = 0;
        call!(self, cuDeviceGet(&mut device, c_int::try_from(ordinal).unwrap_or(c_int::MAX)))?;
        Ok(device)
    }
}

/// The primary context of a GPU, which other CUDA code of this process shares.
pub(super) struct Context {
    driver: Arc<Driver>,
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: see the top of the file.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what a context shares.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn new(driver: Arc<Driver>, ordinal: usize) -> Answer<Arc<Context>> {
        let device = driver.device(ordinal)?;
        let mut raw = null_mut();
        call!(&driver, cuDevicePrimaryCtxRetain(&mut raw, device))?;
        Ok(Arc::new(Context { driver, device, raw }))
    }

    /// The driver, with this context bound to the thread.
    fn bound(&self) -> Answer<&Driver> {
        call!(&self.driver, cuCtxSetCurrent(self.raw))?;
        Ok(&self.driver)
    }

    /// The CUDA version that the driver serves.
    pub(super) fn version(&self) -> Answer<(u32, u32)> {
        self.driver.version()
    }

    /// Bytes that are free.
    pub(super) fn free(&self) -> Answer<u64> {
        let (mut free, mut total) = (0, 0);
        call!(self.bound()?, cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok(free as u64)
    }

    /// A tensor map over memory at `address`; the geometry has been checked.
    pub(super) fn tensor_map(&self, address: u64, g: &Geometry) -> Answer<[u8; 128]> {
        #[repr(C, align(128))]
        struct Aligned(sys::CUtensorMap);
        let driver = self.bound()?;
        let mut map = Aligned(sys::CUtensorMap { opaque: [0; 16] });
        use sys::{CUtensorMapDataType_enum as T, CUtensorMapSwizzle_enum as S};
        let element = match g.element {
            1 => T::CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2 => T::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            _ => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        };
        let swizzle = match g.swizzle {
            32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => S::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let every = [1u32; 5];
        call!(
            driver,
            cuTensorMapEncodeTiled(
                &mut map.0,
                element,
                g.extents.len() as u32,
                address as *mut c_void,
                g.extents.as_ptr(),
                g.strides.as_ptr(),
                g.tile.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )?;
        let mut bytes = [0; 128];
        for (to, from) in bytes.chunks_exact_mut(8).zip(map.0.opaque) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        Ok(bytes)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _ = call!(&self.driver, cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// Memory of a GPU. To free it waits for whatever still uses it.
pub(super) struct Buffer {
    context: Arc<Context>,
    at: u64,
}

impl Buffer {
    /// So many bytes, which `stream` sets to zero.
    pub(super) fn zeroed(stream: &Stream, bytes: usize) -> Answer<Buffer> {
        let context = stream.context.clone();
        if bytes == 0 {
            return Ok(Buffer { context, at: 0 });
        }
        let mut at = 0;
        call!(context.bound()?, cuMemAlloc_v2(&mut at, bytes))?;
        let buffer = Buffer { context, at };
        stream.fill(at, 0, bytes)?;
        Ok(buffer)
    }

    /// Its address; 0 where it has no bytes.
    pub(super) fn at(&self) -> u64 {
        self.at
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.at != 0
            && let Ok(driver) = self.context.bound()
        {
            let _ = call!(driver, cuMemFree_v2(self.at));
        }
    }
}

/// A queue of work, which runs in order.
pub(super) struct Stream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: see the top of the file.
unsafe impl Send for Stream {}

impl Stream {
    pub(super) fn new(context: Arc<Context>) -> Answer<Stream> {
        let mut raw = null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        call!(context.bound()?, cuStreamCreate(&mut raw, flags))?;
        Ok(Stream { context, raw })
    }

    /// Sets bytes of the GPU.
    pub(super) fn fill(&self, at: u64, byte: u8, bytes: usize) -> Answer {
        call!(self.context.bound()?, cuMemsetD8Async(at, byte, bytes, self.raw))
    }

    /// Copies within the GPU.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) -> Answer {
        call!(self.context.bound()?, cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw))
    }

    /// Waits for everything queued so far; what went wrong in it shows here.
    pub(super) fn wait(&self) -> Answer {
        call!(self.context.bound()?, cuStreamSynchronize(self.raw))
    }

    /// Starts a kernel. `params` is its parameter buffer and `offsets` say where each parameter begins.
    pub(super) fn launch(&self, f: &Function, shape: &Shape, params: &mut [u8], offsets: &[u32]) -> Answer {
        let driver = self.context.bound()?;
        let base = params.as_mut_ptr();
        let mut pointers: Vec<*mut c_void> =
            offsets.iter().map(|&offset| base.wrapping_add(offset as usize).cast()).collect();
        let ([gx, gy, gz], [bx, by, bz], shared) = (shape.grid, shape.block, shape.shared);
        if shape.cluster == [1, 1, 1] {
            let (list, none) = (pointers.as_mut_ptr(), null_mut());
            return call!(
                driver,
                cuLaunchKernel(f.raw, gx, gy, gz, bx, by, bz, shared, self.raw, list, none)
            );
        }
        let [x, y, z] = shape.cluster;
        let mut attribute = sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z },
            },
        };
        let config = sys::CUlaunchConfig_st {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: shared,
            hStream: self.raw,
            attrs: &mut attribute,
            numAttrs: 1,
        };
        call!(driver, cuLaunchKernelEx(&config, f.raw, pointers.as_mut_ptr(), null_mut()))
    }

    /// Records what `work` queues as a graph, instead of running it.
    pub(super) fn capture<E: From<Failure>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        let driver = self.context.bound()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        call!(driver, cuStreamBeginCapture_v2(self.raw, mode))?;
        let queued = work();
        let mut graph = null_mut();
        let ended = call!(driver, cuStreamEndCapture(self.raw, &mut graph));
        let mut raw = null_mut();
        let made = match (queued, ended) {
            (Err(e), _) => Err(e),
            (_, Err(f)) => Err(f.into()),
            _ => call!(driver, cuGraphInstantiateWithFlags(&mut raw, graph, 0)).map_err(E::from),
        };
        if !graph.is_null() {
            let _ = call!(driver, cuGraphDestroy(graph));
        }
        made.map(|()| Graph { context: self.context.clone(), raw })
    }

    /// Runs a graph.
    pub(super) fn replay(&self, graph: &mut Graph) -> Answer {
        call!(self.context.bound()?, cuGraphLaunch(graph.raw, self.raw))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.wait();
        if let Ok(driver) = self.context.bound() {
            let _ = call!(driver, cuStreamDestroy_v2(self.raw));
        }
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) cluster: [u32; 3],
    pub(super) shared: u32,
}

/// Work that was recorded once.
pub(super) struct Graph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
}

// SAFETY: see the top of the file.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(driver) = self.context.bound() {
            let _ = call!(driver, cuGraphExecDestroy(self.raw));
        }
    }
}

/// A moment in a stream.
pub(super) struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Answer<Event> {
        let mut raw = null_mut();
        call!(context.bound()?, cuEventCreate(&mut raw, 0))?;
        Ok(Event { context: context.clone(), raw })
    }

    /// Takes the moment.
    pub(super) fn record(&self, stream: &Stream) -> Answer {
        call!(self.context.bound()?, cuEventRecord(self.raw, stream.raw))
    }

    /// The time since another; both have passed.
    pub(super) fn since(&self, start: &Event) -> Answer<Duration> {
        let mut milliseconds: f32 = 0.0;
        call!(self.context.bound()?, cuEventElapsedTime(&mut milliseconds, start.raw, self.raw))?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(driver) = self.context.bound() {
            let _ = call!(driver, cuEventDestroy_v2(self.raw));
        }
    }
}

/// PTX, compiled by the driver.
pub(super) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

// SAFETY: see the top of the file.
unsafe impl Send for Module {}

// SAFETY: as above; nothing about a module changes.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles; a refusal comes with the compiler's log.
    pub(super) fn load(context: &Arc<Context>, ptx: &str) -> Result<Module, (Failure, String)> {
        use sys::CUjit_option_enum as O;
        const LOG: usize = 16 << 10;
        let bare = |f: Failure| (f, String::new());
        let driver = context.bound().map_err(bare)?;
        let unread = |_| bare(driver.answer("cuModuleLoadDataEx", 218).err().unwrap_or_else(missing));
        let text = CString::new(ptx).map_err(unread)?;
        let (mut errors, mut infos) = (vec![0u8; LOG], vec![0u8; LOG]);
        let mut options = [
            O::CU_JIT_ERROR_LOG_BUFFER,
            O::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
            O::CU_JIT_INFO_LOG_BUFFER,
            O::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
        ];
        // Sizes are passed in place of pointers.
        let mut values: [*mut c_void; 4] = [
            errors.as_mut_ptr().cast(),
            std::ptr::without_provenance_mut(LOG),
            infos.as_mut_ptr().cast(),
            std::ptr::without_provenance_mut(LOG),
        ];
        let mut raw = null_mut();
        let loaded = call!(
            driver,
            cuModuleLoadDataEx(&mut raw, text.as_ptr().cast(), 4, options.as_mut_ptr(), values.as_mut_ptr())
        );
        match loaded {
            Ok(()) => Ok(Module { context: context.clone(), raw }),
            Err(f) => {
                let log = |buffer: &[u8]| {
                    let text = CStr::from_bytes_until_nul(buffer).unwrap_or_default();
                    text.to_string_lossy().into_owned()
                };
                Err((f, log(&errors) + &log(&infos)))
            }
        }
    }

    /// An entry point of it.
    pub(super) fn function(self: &Arc<Self>, entry: &str) -> Answer<Function> {
        let driver = self.context.bound()?;
        let name = CString::new(entry).unwrap_or_default();
        let mut raw = null_mut();
        call!(driver, cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()))?;
        Ok(Function { module: self.clone(), raw })
    }
}

fn missing() -> Failure {
    Failure { call: "cuModuleLoadDataEx", code: Code::MAX, name: "missing".into() }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(driver) = self.context.bound() {
            let _ = call!(driver, cuModuleUnload(self.raw));
        }
    }
}

/// A kernel.
pub(super) struct Function {
    module: Arc<Module>,
    raw: sys::CUfunction,
}

// SAFETY: see the top of the file.
unsafe impl Send for Function {}

impl Function {
    /// Lets a launch ask for so many bytes of dynamic shared memory.
    pub(super) fn allow_shared(&self, bytes: u32) -> Answer {
        let what = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        call!(self.module.context.bound()?, cuFuncSetAttribute(self.raw, what, bytes))
    }

    /// Registers of a thread, and bytes that it keeps in local memory.
    pub(super) fn registers_and_local(&self) -> Answer<(u32, u32)> {
        use sys::CUfunction_attribute_enum as A;
        let driver = self.module.context.bound()?;
        let attribute = |what| {
            let mut value = 0;
            call!(driver, cuFuncGetAttribute(&mut value, what, self.raw))?;
            Ok::<u32, Failure>(u32::try_from(value).unwrap_or(0))
        };
        Ok((attribute(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?, attribute(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?))
    }
}

/// Page-locked memory of the host, through which everything goes to and from the GPU: a ring, so that
/// what is written need not wait for what was written before.
pub(super) struct Staging {
    context: Arc<Context>,
    raw: *mut c_void,
    bytes: usize,
    used: usize,
}

// SAFETY: see the top of the file.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Answer<Staging> {
        let mut raw = null_mut();
        call!(context.bound()?, cuMemAllocHost_v2(&mut raw, bytes))?;
        Ok(Staging { context: context.clone(), raw, bytes, used: 0 })
    }

    /// A piece that no copy uses; once around the ring it waits for the copies of the last time around.
    fn piece(&mut self, stream: &Stream, bytes: usize) -> Answer<&mut [u8]> {
        if self.used + bytes > self.bytes {
            stream.wait()?;
            self.used = 0;
        }
        let at = self.raw.cast::<u8>().wrapping_add(self.used);
        self.used = (self.used + bytes).next_multiple_of(64).min(self.bytes);
        // SAFETY: inside the memory that `new` was given, and behind every piece handed out since the last
        // wait, so that neither a reference nor a copy on its way uses it.
        Ok(unsafe { std::slice::from_raw_parts_mut(at, bytes) })
    }

    /// Writes to the GPU. It returns when `data` has been read; the stream does the rest.
    pub(super) fn write(&mut self, stream: &Stream, data: &[u8], to: u64) -> Answer {
        let mut to = to;
        for data in data.chunks(self.bytes) {
            let piece = self.piece(stream, data.len())?;
            piece.copy_from_slice(data);
            let from = piece.as_ptr().cast();
            call!(self.context.bound()?, cuMemcpyHtoDAsync_v2(to, from, data.len(), stream.raw))?;
            to += data.len() as u64;
        }
        Ok(())
    }

    /// Reads from the GPU, after everything queued so far.
    pub(super) fn read(&mut self, stream: &Stream, from: u64, into: &mut [u8]) -> Answer {
        let context = self.context.clone();
        let mut from = from;
        for into in into.chunks_mut(self.bytes) {
            let piece = self.piece(stream, into.len())?;
            let to = piece.as_mut_ptr().cast();
            call!(context.bound()?, cuMemcpyDtoHAsync_v2(to, from, into.len(), stream.raw))?;
            stream.wait()?;
            into.copy_from_slice(piece);
            self.used = 0;
            from += into.len() as u64;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Ok(driver) = self.context.bound() {
            let _ = call!(driver, cuMemFreeHost(self.raw));
        }
    }
}
