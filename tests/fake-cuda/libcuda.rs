//! A driver library for tests on machines without a GPU: `libcuda.so.1` with host memory for a GPU's.
//!
//! What is queued in a stream happens when somebody waits for it, as late as a GPU could be. Every access is
//! held against what was allocated, every call against the rules of the driver API that the tests rely on
//! (a context is bound, nothing is allocated while a graph is recorded, arguments are in range). Kernels are
//! recorded, not run, but for `double_f32`.
//!
//! Environment: `FAKE_CUDA` is what is wrong with it (see the matches on `wrong()`), and
//! `FAKE_CUDA_{VERSION,DEVICES,CAPABILITY,FREE}` describe it; `FAKE_CUDA_LOG` is the file for what was done.
//! Compiled with `--cfg bare` it has `cuInit` alone, with `--cfg old` it lacks what CUDA 11.4 brought, with
//! `--cfg plain` what 11.8 and 12.0 brought for clusters and tensor maps.
#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::{
    cell::Cell,
    collections::BTreeMap,
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    fs::OpenOptions,
    io::Write,
    sync::Mutex,
    thread::{self, ThreadId},
};

type Code = c_uint;
const OK: Code = 0;
const INVALID_VALUE: Code = 1;

fn setting(name: &str) -> Option<String> {
    std::env::var(format!("FAKE_CUDA{name}")).ok()
}

fn number(name: &str, default: u64) -> u64 {
    setting(name).and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// What is wrong with this driver.
fn wrong() -> String {
    setting("").unwrap_or_default()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> Code {
    match wrong().as_str() {
        "stub" => 34,
        "no device" => 100,
        "mismatch" => 803,
        "novelty" => 7777,
        _ => OK,
    }
}

#[cfg(not(bare))]
pub use driver::*;

#[cfg(not(bare))]
mod driver {
    use super::*;

    /// A piece of work in a stream.
    #[derive(Clone)]
    enum Work {
        Write { to: u64, from: usize, bytes: usize },
        Read { to: usize, from: u64, bytes: usize },
        Copy { to: u64, from: u64, bytes: usize },
        Fill { at: u64, byte: u8, bytes: usize },
        Kernel { name: String, params: Vec<u8>, line: String },
        Graph(Vec<Work>),
    }

    #[derive(Default)]
    struct Machine {
        memory: BTreeMap<u64, Vec<u8>>,
        pinned: BTreeMap<usize, Vec<u8>>,
        contexts: i64,
        streams: Vec<Option<Stream>>,
        graphs: Vec<Option<Vec<Work>>>,
        modules: Vec<Option<Vec<Entry>>>,
        functions: Vec<Entry>,
        events: i64,
        /// The fault that everything answers once it happened.
        fault: Code,
    }

    #[derive(Default)]
    struct Stream {
        queue: Vec<Work>,
        /// Who records, and whether that forbids others to allocate as well.
        recording: Option<(ThreadId, bool)>,
        recorded: Vec<Work>,
    }

    #[derive(Clone)]
    struct Entry {
        name: String,
        /// Bytes of each parameter.
        params: Vec<usize>,
        shared: u32,
    }

    static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

    thread_local! {
        static BOUND: Cell<bool> = const { Cell::new(false) };
    }

    fn log(line: &str) {
        let Some(path) = setting("_LOG") else { return };
        if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(path) {
            let _ = writeln!(file, "{line}");
        }
    }

    fn with(f: impl FnOnce(&mut Machine) -> Code) -> Code {
        let Ok(mut machine) = MACHINE.lock() else { return 999 };
        f(machine.get_or_insert_default())
    }

    /// A call that needs a bound context and a machine that has not faulted.
    fn bound(f: impl FnOnce(&mut Machine) -> Code) -> Code {
        if !BOUND.get() {
            return 201;
        }
        with(|m| if m.fault != OK { m.fault } else { f(m) })
    }

    fn put<T>(at: *mut T, value: T) -> Code {
        if at.is_null() {
            return INVALID_VALUE;
        }
        unsafe { at.write(value) };
        OK
    }

    impl Machine {
        /// Bytes of the GPU, if all of them lie in one allocation.
        fn bytes(&mut self, at: u64, bytes: usize) -> Option<&mut [u8]> {
            let (start, block) = self.memory.range_mut(..=at).next_back()?;
            let offset = (at - start) as usize;
            block.get_mut(offset..offset.checked_add(bytes)?)
        }

        /// Whether a graph is being recorded that forbids this thread what a graph cannot hold.
        fn is_recording(&self) -> bool {
            let here = thread::current().id();
            let forbids = |s: &Stream| s.recording.is_some_and(|(by, all)| all || by == here);
            self.streams.iter().flatten().any(forbids)
        }

        fn is_pinned(&self, at: usize, bytes: usize) -> bool {
            let block = self.pinned.range(..=at).next_back();
            block.is_some_and(|(start, block)| at - start + bytes <= block.len())
        }

        fn queue(&mut self, stream: usize, work: Work) -> Code {
            match self.streams.get_mut(stream.wrapping_sub(1)).and_then(Option::as_mut) {
                Some(s) if s.recording.is_some() => s.recorded.push(work),
                Some(s) => s.queue.push(work),
                None => return 400,
            }
            OK
        }

        /// Does everything that is queued.
        fn settle(&mut self) -> Code {
            for i in 0..self.streams.len() {
                let Some(stream) = &mut self.streams[i] else { continue };
                for work in std::mem::take(&mut stream.queue) {
                    self.work(work);
                }
            }
            self.fault
        }

        fn work(&mut self, work: Work) {
            if self.fault != OK {
                return;
            }
            let done = match work {
                Work::Graph(all) => {
                    log("replay");
                    return all.into_iter().for_each(|w| self.work(w));
                }
                Work::Write { to, from, bytes } => self.bytes(to, bytes).map(|to| {
                    to.copy_from_slice(unsafe { std::slice::from_raw_parts(from as *const u8, bytes) });
                }),
                Work::Read { to, from, bytes } => self.bytes(from, bytes).map(|from| {
                    unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) }.copy_from_slice(from);
                }),
                Work::Copy { to, from, bytes } => {
                    log(&format!("copy {bytes}"));
                    let from = self.bytes(from, bytes).map(|b| b.to_vec());
                    from.and_then(|from| self.bytes(to, bytes).map(|to| to.copy_from_slice(&from)))
                }
                Work::Fill { at, byte, bytes } => {
                    log(&format!("fill {byte} {bytes}"));
                    self.bytes(at, bytes).map(|b| b.fill(byte))
                }
                Work::Kernel { name, params, line } => {
                    log(&line);
                    self.kernel(&name, &params)
                }
            };
            if done.is_none() || wrong() == "fault" && self.fault == OK && self.armed() {
                self.fault = 700;
            }
        }

        /// Whether something that can fault has been launched: every kernel can.
        fn armed(&self) -> bool {
            !self.functions.is_empty()
        }

        /// `double_f32(y, x, n)`: y = 2 x; others do nothing.
        fn kernel(&mut self, name: &str, params: &[u8]) -> Option<()> {
            if name != "double_f32" {
                return Some(());
            }
            let word = |i: usize| u64::from_le_bytes(params[8 * i..8 * i + 8].try_into().unwrap_or_default());
            let n = u32::from_le_bytes(params[16..20].try_into().ok()?) as usize;
            let x = self.bytes(word(1), 4 * n)?.to_vec();
            for (y, x) in self.bytes(word(0), 4 * n)?.chunks_exact_mut(4).zip(x.chunks_exact(4)) {
                let x = f32::from_le_bytes(x.try_into().ok()?);
                y.copy_from_slice(&(2.0 * x).to_le_bytes());
            }
            Some(())
        }

        fn report(&self) {
            let live = |n: usize| n.to_string();
            let (streams, graphs) = (self.streams.iter().flatten().count(), self.graphs.iter().flatten().count());
            let modules = self.modules.iter().flatten().count();
            let memory = self.memory.len() + self.pinned.len();
            log(&format!(
                "left: memory {} streams {} graphs {} modules {} events {}",
                live(memory),
                live(streams),
                live(graphs),
                live(modules),
                self.events
            ));
        }
    }

    /// The entries of a PTX text and the bytes of their parameters.
    fn entries(text: &str) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (at, _) in text.match_indices(".entry") {
            let rest = &text[at + 6..];
            let (Some(open), Some(close)) = (rest.find('('), rest.find(')')) else { continue };
            let params = rest[open + 1..close].split(',').filter(|p| p.contains(".param"));
            let bytes = |p: &str| {
                if let Some((_, n)) = p.split_once('[') {
                    return n.trim_end().trim_end_matches(']').parse().unwrap_or(0);
                }
                if p.contains("64") { 8 } else { 4 }
            };
            let params = params.map(bytes).collect();
            entries.push(Entry { name: rest[..open].trim().into(), params, shared: 48 << 10 });
        }
        entries
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuGetErrorName(code: Code, name: *mut *const c_char) -> Code {
        let text = match code {
            0 => c"CUDA_SUCCESS",
            1 => c"CUDA_ERROR_INVALID_VALUE",
            2 => c"CUDA_ERROR_OUT_OF_MEMORY",
            34 => c"CUDA_ERROR_STUB_LIBRARY",
            100 => c"CUDA_ERROR_NO_DEVICE",
            201 => c"CUDA_ERROR_INVALID_CONTEXT",
            218 => c"CUDA_ERROR_INVALID_PTX",
            222 => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
            500 => c"CUDA_ERROR_NOT_FOUND",
            700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            701 => c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
            803 => c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            900 => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            _ => return INVALID_VALUE,
        };
        put(name, text.as_ptr())
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
        put(version, number("_VERSION", 12040) as c_int)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
        put(count, number("_DEVICES", 1) as c_int)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
        if u64::try_from(ordinal).is_ok_and(|n| n < number("_DEVICES", 1)) { put(device, ordinal) } else { 101 }
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _: c_int) -> Code {
        let text = b"Pretended GPU\0";
        if (len as usize) < text.len() {
            return INVALID_VALUE;
        }
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
        OK
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, what: c_uint, _: c_int) -> Code {
        let capability = setting("_CAPABILITY").unwrap_or("8.0".into());
        let (major, minor) = capability.split_once('.').unwrap_or(("8", "0"));
        put(
            value,
            match what {
                13 => 1_410_000,
                16 => 108,
                38 => 40 << 20,
                75 => major.parse().unwrap_or(8),
                76 => minor.parse().unwrap_or(0),
                97 => 163 << 10,
                _ => return INVALID_VALUE,
            },
        )
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _: c_int) -> Code {
        put(bytes, 80 << 30)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
        with(|m| {
            m.contexts += 1;
            OK
        });
        put(context, 1 + device as usize)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> Code {
        with(|m| {
            m.contexts -= 1;
            if m.contexts == 0 {
                m.report();
            }
            OK
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuCtxSetCurrent(context: usize) -> Code {
        BOUND.set(context != 0);
        OK
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
        bound(|m| {
            let used: usize = m.memory.values().map(Vec::len).sum();
            put(total, 80 << 30);
            put(free, (number("_FREE", 1 << 30) as usize).saturating_sub(used))
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> Code {
        bound(|m| {
            let used: usize = m.memory.values().map(Vec::len).sum();
            if m.is_recording() {
                return 900;
            }
            if bytes == 0 || used + bytes > number("_FREE", 1 << 30) as usize || wrong() == "no memory" {
                return if bytes == 0 { INVALID_VALUE } else { 2 };
            }
            // Not zero, as a GPU's; addresses of its own, aligned as a GPU's, with gaps between.
            let last = m.memory.last_key_value();
            let next = last.map_or(1 << 40, |(at, b)| (at + b.len() as u64 + 4096).next_multiple_of(512));
            m.memory.insert(next, vec![0xcd; bytes]);
            log(&format!("alloc {bytes}"));
            put(at, next)
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemFree_v2(at: u64) -> Code {
        bound(|m| {
            m.settle();
            m.memory.remove(&at).map_or(INVALID_VALUE, |_| OK)
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemAllocHost_v2(at: *mut usize, bytes: usize) -> Code {
        bound(|m| {
            let mut block = vec![0xabu8; bytes];
            let address = block.as_mut_ptr() as usize;
            m.pinned.insert(address, block);
            put(at, address)
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemFreeHost(at: usize) -> Code {
        bound(|m| m.pinned.remove(&at).map_or(INVALID_VALUE, |_| OK))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, bytes: usize, stream: usize) -> Code {
        bound(|m| match m.is_pinned(from, bytes) && m.bytes(to, bytes).is_some() {
            true => m.queue(stream, Work::Write { to, from, bytes }),
            false => INVALID_VALUE,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, bytes: usize, stream: usize) -> Code {
        bound(|m| match m.is_pinned(to, bytes) && m.bytes(from, bytes).is_some() {
            true => m.queue(stream, Work::Read { to, from, bytes }),
            false => INVALID_VALUE,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> Code {
        bound(|m| match m.bytes(to, bytes).is_some() && m.bytes(from, bytes).is_some() {
            true => m.queue(stream, Work::Copy { to, from, bytes }),
            false => INVALID_VALUE,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuMemsetD8Async(at: u64, byte: u8, bytes: usize, stream: usize) -> Code {
        bound(|m| match m.bytes(at, bytes).is_some() {
            true => m.queue(stream, Work::Fill { at, byte, bytes }),
            false => INVALID_VALUE,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuStreamCreate(stream: *mut usize, flags: c_uint) -> Code {
        bound(|m| {
            m.streams.push(Some(Stream::default()));
            if flags == 1 { put(stream, m.streams.len()) } else { INVALID_VALUE }
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
        bound(|m| m.streams[stream - 1].take().map_or(400, |_| OK))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuStreamSynchronize(_: usize) -> Code {
        bound(|m| if m.is_recording() { 900 } else { m.settle() })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuStreamBeginCapture_v2(stream: usize, mode: c_uint) -> Code {
        bound(|m| {
            let Some(s) = m.streams.get_mut(stream - 1).and_then(Option::as_mut) else { return 400 };
            s.recording = Some((thread::current().id(), mode == 0));
            OK
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> Code {
        bound(|m| {
            let Some(s) = m.streams.get_mut(stream - 1).and_then(Option::as_mut) else { return 400 };
            s.recording = None;
            let recorded = std::mem::take(&mut s.recorded);
            log(&format!("recorded {}", recorded.len()));
            m.graphs.push(Some(recorded));
            put(graph, m.graphs.len())
        })
    }

    #[cfg(not(old))]
    #[unsafe(no_mangle)]
    pub extern "C" fn cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, _: c_ulonglong) -> Code {
        bound(|m| {
            let work = m.graphs[graph - 1].clone();
            m.graphs.push(work);
            put(exec, m.graphs.len())
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuGraphLaunch(exec: usize, stream: usize) -> Code {
        bound(|m| match m.graphs.get(exec - 1).cloned().flatten() {
            Some(work) => m.queue(stream, Work::Graph(work)),
            None => 400,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuGraphExecDestroy(exec: usize) -> Code {
        log("forget");
        cuGraphDestroy(exec)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuGraphDestroy(graph: usize) -> Code {
        bound(|m| m.graphs[graph - 1].take().map_or(400, |_| OK))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuEventCreate(event: *mut usize, _: c_uint) -> Code {
        bound(|m| {
            m.events += 1;
            put(event, 1)
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuEventRecord(_: usize, _: usize) -> Code {
        bound(|_| OK)
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, _: usize, _: usize) -> Code {
        bound(|_| put(milliseconds, 0.25))
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuEventDestroy_v2(_: usize) -> Code {
        bound(|m| {
            m.events -= 1;
            OK
        })
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuModuleLoadDataEx(
        module: *mut usize,
        image: *const c_char,
        n: c_uint,
        options: *const c_uint,
        values: *const *mut c_void,
    ) -> Code {
        let option = |wanted: c_uint| {
            let at = (0..n as usize).find(|&i| unsafe { *options.add(i) } == wanted)?;
            Some(unsafe { *values.add(at) })
        };
        if wrong() == "old ptx" {
            return 222;
        }
        if wrong() == "jit" {
            if let (Some(buffer), Some(size)) = (option(5), option(6)) {
                let text = b"ptxas error   : Entry function 'double_f32' uses too much shared data\0";
                let n = text.len().min(size as usize);
                unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), n) };
            }
            return 218;
        }
        let text = unsafe { CStr::from_ptr(image) }.to_string_lossy().into_owned();
        bound(|m| {
            let entries = entries(&text);
            log(&format!("load {}", entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(" ")));
            m.modules.push(Some(entries));
            put(module, m.modules.len())
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuModuleUnload(module: usize) -> Code {
        bound(|m| m.modules[module - 1].take().map_or(400, |_| OK))
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuModuleGetFunction(f: *mut usize, module: usize, name: *const c_char) -> Code {
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        bound(|m| {
            let entries = m.modules[module - 1].iter().flatten();
            let Some(entry) = entries.into_iter().find(|e| e.name == name).cloned() else { return 500 };
            m.functions.push(entry);
            put(f, m.functions.len())
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuFuncGetAttribute(value: *mut c_int, what: c_uint, _: usize) -> Code {
        bound(|_| match what {
            3 => put(value, 0),
            4 => put(value, 40),
            _ => INVALID_VALUE,
        })
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuFuncSetAttribute(f: usize, what: c_uint, value: c_int) -> Code {
        bound(|m| {
            if what != 8 || value > 163 << 10 {
                return INVALID_VALUE;
            }
            m.functions[f - 1].shared = value as u32;
            OK
        })
    }

    /// Queues a kernel.
    unsafe fn launch(f: usize, shape: [[u32; 3]; 3], shared: u32, stream: usize, params: *const *const u8) -> Code {
        bound(|m| {
            let Some(entry) = m.functions.get(f.wrapping_sub(1)).cloned() else { return 400 };
            let [grid, block, cluster] = shape;
            let threads: u32 = block.iter().product();
            if grid.contains(&0) || threads == 0 || threads > 1024 || shared > entry.shared {
                return INVALID_VALUE;
            }
            if wrong() == "launch" {
                return 701;
            }
            let mut bytes = Vec::new();
            for (i, &n) in entry.params.iter().enumerate() {
                // As the driver lays them out: each aligned to its size, structures to 64.
                bytes.resize(bytes.len().next_multiple_of(n.min(64)), 0);
                bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(*params.add(i), n) });
            }
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let name = entry.name;
            let line = format!("kernel {name} {grid:?} {block:?} {cluster:?} {shared} {hex}");
            m.queue(stream, Work::Kernel { name, params: bytes, line })
        })
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuLaunchKernel(
        f: usize,
        gx: c_uint,
        gy: c_uint,
        gz: c_uint,
        bx: c_uint,
        by: c_uint,
        bz: c_uint,
        shared: c_uint,
        stream: usize,
        params: *const *const u8,
        _extra: usize,
    ) -> Code {
        unsafe { launch(f, [[gx, gy, gz], [bx, by, bz], [1, 1, 1]], shared, stream, params) }
    }

    #[repr(C)]
    pub struct Config {
        grid: [c_uint; 3],
        block: [c_uint; 3],
        shared: c_uint,
        stream: usize,
        attributes: *const Attribute,
        n: c_uint,
    }

    #[repr(C)]
    pub struct Attribute {
        id: c_uint,
        pad: [u8; 4],
        value: [c_uint; 16],
    }

    #[cfg(not(plain))]
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuLaunchKernelEx(
        config: *const Config,
        f: usize,
        params: *const *const u8,
        _extra: usize,
    ) -> Code {
        let c = unsafe { &*config };
        let attribute = unsafe { &*c.attributes };
        if c.n != 1 || attribute.id != 4 {
            return INVALID_VALUE;
        }
        let cluster = [attribute.value[0], attribute.value[1], attribute.value[2]];
        unsafe { launch(f, [c.grid, c.block, cluster], c.shared, c.stream, params) }
    }

    /// The first words tell what was encoded: address, type, rank, swizzle, extents, strides, box.
    #[cfg(not(plain))]
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuTensorMapEncodeTiled(
        map: *mut [u64; 16],
        element: c_uint,
        rank: u32,
        address: u64,
        extents: *const u64,
        strides: *const u64,
        tile: *const u32,
        every: *const u32,
        interleave: c_uint,
        swizzle: c_uint,
        _promotion: c_uint,
        _fill: c_uint,
    ) -> Code {
        let n = rank as usize;
        if !(map as usize).is_multiple_of(64) || address % 16 != 0 || n > 4 || interleave != 0 {
            return INVALID_VALUE;
        }
        let mut words = [0; 16];
        words[0] = address;
        words[1] = u64::from(element) << 32 | u64::from(swizzle) << 16 | u64::from(rank);
        for i in 0..n {
            words[2 + i] = unsafe { *extents.add(i) };
            words[10 + i] = u64::from(unsafe { *tile.add(i) });
            if unsafe { *every.add(i) } != 1 {
                return INVALID_VALUE;
            }
        }
        for i in 0..n - 1 {
            words[6 + i] = unsafe { *strides.add(i) };
        }
        put(map, words)
    }
}
