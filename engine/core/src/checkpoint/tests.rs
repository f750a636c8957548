use super::{weights::MAX_HEADER, *};
use crate::{
    random::{Purpose, Stream},
    tensor::{DType, Shape},
};
use safetensors::SafeTensors;
use std::{
    io::{Seek, SeekFrom},
    process::{Child, Command, Stdio},
    time::Duration,
};

/// A folder that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("transfusion-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Tensors of every dtype, with odd sizes, no elements, no dimensions.
const SPECS: [(&str, &[usize], DType); 8] = [
    ("bytes", &[3], DType::U8),
    ("double", &[1, 2], DType::F64),
    ("embed.weight", &[5, 3], DType::Bf16),
    ("empty", &[0, 7], DType::F32),
    ("norm.weight", &[7], DType::F32),
    ("positions", &[1, 3, 1, 1], DType::I32),
    ("scalar", &[], DType::F32),
    ("z", &[1], DType::U8),
];

fn specs() -> Vec<(&'static str, Spec)> {
    let shape = |dims: &[usize]| match *dims {
        [] => Shape::from([0usize; 0]),
        [a] => Shape::from([a]),
        [a, b] => Shape::from([a, b]),
        [a, b, c, d] => Shape::from([a, b, c, d]),
        _ => unreachable!(),
    };
    SPECS.iter().map(|&(name, dims, dtype)| (name, Spec { shape: shape(dims), dtype })).collect()
}

/// Bytes that depend on the name, the position and `salt`.
fn fill(salt: u64) -> impl FnMut(&str, ViewMut<'_>) -> Result<()> {
    move |name, mut into| {
        let stream = Stream::new(salt, Purpose::Test, u64::from(crc32fast::hash(name.as_bytes())));
        into.bytes().iter_mut().zip(0..).for_each(|(byte, i)| *byte = stream.word(i) as u8);
        Ok(())
    }
}

fn expected(name: &str, spec: Spec, salt: u64) -> Host {
    let mut host = Host::zeros(spec);
    fill(salt)(name, host.view_mut()).unwrap();
    host
}

fn save(dir: &Path, salt: u64) -> Result<()> {
    let mut writer = Writer::create(dir)?;
    writer.tensors("model.safetensors", &specs(), fill(salt))?;
    writer.tensors("optimizer.safetensors", &specs()[..2], fill(salt + 1))?;
    writer.text("state.json", "{\"step\": 3}\n")?;
    writer.text("empty.txt", "")?;
    writer.commit()
}

fn file_of(why: &Error) -> PathBuf {
    match why {
        Error::File { path, .. } => path.clone(),
        other => panic!("{other}"),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = entries(folder).unwrap().into_iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    names
}

#[test]
fn every_dtype_comes_back_bit_for_bit() {
    let scratch = Scratch::new("roundtrip");
    let dir = scratch.0.join("step-00000003");
    save(&dir, 1).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.specs("model.safetensors").unwrap(), specs());
    for (name, spec) in specs() {
        let host = checkpoint.tensor("model.safetensors", name).unwrap();
        assert_eq!(host.view().bytes(), expected(name, spec, 1).view().bytes(), "{name}");
        assert_eq!(host.view().dtype(), spec.dtype);
    }
    let second = checkpoint.tensor("optimizer.safetensors", "bytes").unwrap();
    assert_eq!(second, expected("bytes", specs()[0].1, 2));
    assert_eq!(checkpoint.text("state.json").unwrap(), "{\"step\": 3}\n");
    assert_eq!(checkpoint.text("empty.txt").unwrap(), "");
    assert_eq!(names(&scratch.0), ["step-00000003"]);
}

#[test]
fn files_are_what_the_safetensors_crate_reads() {
    let scratch = Scratch::new("format");
    let path = scratch.0.join("model.safetensors");
    weights::write(&path, &specs(), fill(4)).unwrap();
    let bytes = fs::read(&path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let data = bytes.as_ptr().addr() + 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for (name, spec) in specs() {
        let tensor = theirs.tensor(name).unwrap();
        assert_eq!(tensor.shape(), spec.shape.dims());
        assert_eq!(tensor.data(), expected(name, spec, 4).view().bytes());
        assert_eq!((tensor.data().as_ptr().addr() - data) % spec.dtype.size(), 0, "{name} lies askew");
    }
    assert_eq!(names(&scratch.0), ["model.safetensors"]);
}

#[test]
fn foreign_files_may_lie_askew_hold_halves_and_be_sharded() {
    let scratch = Scratch::new("foreign");
    let first = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                    "b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},
                    "old":{"dtype":"I64","shape":[1],"data_offsets":[9,17]}}"#;
    let mut bytes = (first.len() as u64).to_le_bytes().to_vec();
    bytes.extend(first.as_bytes());
    bytes.push(9);
    bytes.extend(bytemuck::cast_slice(&[1.5_f32, -2.5]));
    bytes.extend([0; 8]);
    fs::write(scratch.0.join("m-1.safetensors"), &bytes).unwrap();
    let second = r#"{"h":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]}}"#;
    let mut bytes = (second.len() as u64).to_le_bytes().to_vec();
    bytes.extend(second.as_bytes());
    bytes.extend(bytemuck::cast_slice(&[half::f16::from_f32(0.25), half::f16::from_f32(-8.0)]));
    fs::write(scratch.0.join("m-2.safetensors"), &bytes).unwrap();
    let index = scratch.0.join("model.safetensors.index.json");
    let map = |map: &str| fs::write(&index, format!("{{\"weight_map\": {{{map}}}}}")).unwrap();

    map(
        r#""a": "m-1.safetensors", "b": "m-1.safetensors", "old": "m-1.safetensors", "h": "m-2.safetensors""#,
    );
    let weights = Weights::open(&scratch.0).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "h", "old"]);
    assert_eq!(weights.read("b").unwrap(), Host::F32(vec![1.5, -2.5]));
    assert_eq!(weights.read("h").unwrap(), Host::F32(vec![0.25, -8.0]));
    assert!(weights.read("old").unwrap_err().to_string().contains("tensor old: elements are I64"));
    assert!(weights.read("c").unwrap_err().to_string().contains("no such tensor"));

    for (entry, why) in [
        (r#""a": "../m-1.safetensors""#, "no safe file name"),
        (r#""a": "/etc/passwd""#, "no safe file name"),
        (r#""a": "m-3.safetensors""#, "m-3.safetensors: cannot be read"),
        (r#""x": "m-1.safetensors""#, "tensor x: not in m-1.safetensors"),
        (r#""a": "m-1.safetensors", "a": "m-1.safetensors""#, "tensor a is named twice"),
        (r#""a": 7"#, "tensor a"),
    ] {
        map(entry);
        let error = Weights::open(&index).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn hostile_headers_are_refused() {
    let scratch = Scratch::new("hostile");
    let path = scratch.0.join("bad.safetensors");
    let huge = usize::MAX;
    for (header, why) in [
        (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#.to_owned(), "named twice"),
        (r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}"#.to_owned(), "header"),
        (r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#.to_owned(), "header"),
        (r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#.to_owned(), "speaks of"),
        (r#"{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}"#.to_owned(), "a is not described"),
        (r#"{"__metadata__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#.to_owned(), "__metadata__"),
        (format!(r#"{{"a":{{"dtype":"U8","shape":[{huge},{huge},0],"data_offsets":[0,0]}}}}"#), "any memory"),
        (format!(r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}}}}"#), "any memory"),
        ("[".repeat(5000), "header"),
        ("{}".to_owned(), "speaks of"),
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.push(0);
        fs::write(&path, bytes).unwrap();
        let error = Weights::open(&path).unwrap_err().to_string();
        assert!(error.contains("bad.safetensors") && error.contains(why), "{header:.80}: {error}");
    }
    for size in [MAX_HEADER + 1, u64::MAX, 17] {
        fs::write(&path, [size.to_le_bytes(), [b' '; 8]].concat()).unwrap();
        assert!(Weights::open(&path).unwrap_err().to_string().contains("claims a header"));
    }
    assert!(Weights::open(&scratch.0).unwrap_err().to_string().contains("holds neither"));
    assert!(Weights::open(&scratch.0.join("none")).is_err());
}

/// What no CRC32 stands before must still be an error or other values, never a panic.
#[test]
fn mutants_of_a_foreign_file_never_panic() {
    let scratch = Scratch::new("mutants");
    let path = scratch.0.join("m.safetensors");
    weights::write(&path, &specs(), fill(5)).unwrap();
    let whole = fs::read(&path).unwrap();
    for case in 0..3000 {
        let stream = Stream::new(8, Purpose::Test, case);
        let mut bytes = whole.clone();
        for k in 0..1 + stream.below(0, 3) {
            let at = stream.below(2 * k + 1, bytes.len() as u32) as usize;
            bytes[at] = b"0123456789[]{},:\"aF\xff"[stream.below(2 * k + 2, 20) as usize];
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(weights) = Weights::open(&path) {
            weights.names().for_each(|name| drop(weights.read(name)));
        }
    }
}

#[test]
fn flipped_bits_are_refused_by_name() {
    let scratch = Scratch::new("bits");
    let dir = scratch.0.join("step-00000001");
    let mut writer = Writer::create(&dir).unwrap();
    writer.tensors("model.safetensors", &specs()[..3], fill(1)).unwrap();
    writer.text("state.json", "{\"step\": 1}\n").unwrap();
    writer.commit().unwrap();
    let mut files: Vec<(PathBuf, File, u32)> = Vec::new();
    for (_, path) in entries(&dir).unwrap() {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let bits = 8 * file.metadata().unwrap().len() as u32;
        files.push((path, file, bits));
    }
    let total = files.iter().map(|(.., bits)| bits).sum();
    let stream = Stream::new(9, Purpose::Test, 0);
    let random = (0..10_000).map(|i| stream.below(i, total));
    // And every bit of every file, headers and manifest among them: the checkpoint is small.
    for mut bit in random.chain(0..total) {
        let (path, file, _) = files
            .iter_mut()
            .find(|(.., bits)| bit.checked_sub(*bits).inspect(|&rest| bit = rest).is_none())
            .unwrap();
        flip(file, bit);
        assert_eq!(&file_of(&Checkpoint::open(&dir).unwrap_err()), path, "bit {bit}");
        flip(file, bit);
    }
    Checkpoint::open(&dir).unwrap();
}

fn flip(file: &mut File, bit: u32) {
    let mut byte = [0];
    let at = SeekFrom::Start(u64::from(bit / 8));
    file.seek(at).and_then(|_| file.read_exact(&mut byte)).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.seek(at).and_then(|_| file.write_all(&byte)).unwrap();
}

#[test]
fn a_damaged_tensor_is_named() {
    let scratch = Scratch::new("named");
    let dir = scratch.0.join("step-00000001");
    save(&dir, 6).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(Checkpoint::open(&dir).unwrap_err().to_string().contains("in tensor z:"));
    assert!(checkpoint.tensor("model.safetensors", "z").unwrap_err().to_string().contains("has changed"));
    checkpoint.tensor("model.safetensors", "bytes").unwrap();
}

#[test]
fn truncated_longer_missing_and_surplus_files_are_refused() {
    let scratch = Scratch::new("sizes");
    let dir = scratch.0.join("step-00000001");
    save(&dir, 6).unwrap();
    for (_, path) in entries(&dir).unwrap() {
        let whole = fs::read(&path).unwrap();
        let refused = || assert_eq!(file_of(&Checkpoint::open(&dir).unwrap_err()), path);
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            refused();
        }
        fs::write(&path, [&whole[..], b"\n"].concat()).unwrap();
        refused();
        fs::remove_file(&path).unwrap();
        refused();
        fs::create_dir(&path).unwrap();
        refused();
        fs::remove_dir(&path).unwrap();
        fs::write(&path, whole).unwrap();
    }
    let surplus = dir.join("notes.txt");
    fs::write(&surplus, "").unwrap();
    assert_eq!(file_of(&Checkpoint::open(&dir).unwrap_err()), surplus);
}

#[test]
fn a_manifest_of_another_version_or_place_is_refused() {
    let scratch = Scratch::new("manifest");
    let dir = scratch.0.join("step-00000001");
    save(&dir, 6).unwrap();
    let listed = |name: &str| Listed { name: name.to_owned(), bytes: 0, crc32: hex(0), tensors: Vec::new() };
    for (version, files, why) in [
        (2, vec![], "has version 2"),
        (1, vec![listed("../step-00000002")], "no safe file name"),
        (1, vec![listed("a"), listed("a")], "lists a twice"),
        (1, vec![listed(MANIFEST)], "twice"),
    ] {
        fs::write(dir.join(MANIFEST), Manifest { version, files }.to_text().unwrap()).unwrap();
        let error = Checkpoint::open(&dir).unwrap_err().to_string();
        assert!(error.contains(MANIFEST) && error.contains(why), "{error}");
    }
}

/// Accepts so many bytes, then is full.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.0);
        self.0 -= n;
        if n == 0 && !bytes.is_empty() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(n) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_fills_up_at_any_byte_is_an_error() {
    let whole = emit(&mut io::sink(), Path::new("m"), &specs(), fill(1)).unwrap().bytes as usize;
    for room in 0..whole {
        let error = emit(&mut Full(room), Path::new("m"), &specs(), fill(1)).err().unwrap();
        assert!(error.to_string().contains("m: cannot be written"), "{error}");
    }
    emit(&mut Full(whole), Path::new("m"), &specs(), fill(1)).unwrap();
    if let Ok(mut full) = File::options().write(true).open("/dev/full") {
        assert!(emit(&mut full, Path::new("/dev/full"), &specs(), fill(1)).is_err());
    }
}

#[test]
fn a_failed_save_leaves_nothing_and_overwrites_nothing() {
    let scratch = Scratch::new("failed");
    let dir = scratch.0.join("step-00000001");
    let mut writer = Writer::create(&dir).unwrap();
    writer.tensors("model.safetensors", &specs(), fill(1)).unwrap();
    assert!(writer.text("text.safetensors", "").is_err());
    assert!(writer.tensors("model.bin", &specs(), fill(1)).is_err());
    assert!(writer.tensors("model.safetensors", &specs(), fill(1)).is_err());
    assert!(writer.text("../state.json", "").is_err());
    assert!(writer.tensors("t.safetensors", &[specs()[0], specs()[0]], fill(1)).is_err());
    let failing = |_: &str, _: ViewMut<'_>| Err(Error::Device("lost".to_owned()));
    assert!(writer.tensors("u.safetensors", &specs(), failing).is_err());
    assert_eq!(names(&scratch.0).len(), 1);
    drop(writer);
    assert_eq!(names(&scratch.0), [""; 0]);

    save(&dir, 1).unwrap();
    assert!(save(&dir, 2).unwrap_err().to_string().contains("never overwritten"));
    let state = Checkpoint::open(&dir).unwrap().tensor("model.safetensors", "z").unwrap();
    assert_eq!(state, expected("z", specs()[7].1, 1));

    let late = Writer::create(scratch.0.join("step-00000002")).unwrap();
    fs::write(scratch.0.join("step-00000002"), "").unwrap();
    assert!(late.commit().unwrap_err().to_string().contains("never overwritten"));
    assert!(Writer::create(scratch.0.join("step-00000002").join("below")).is_err());
    assert_eq!(names(&scratch.0), ["step-00000001", "step-00000002"]);
}

#[cfg(unix)]
#[test]
fn files_are_as_readable_as_any_other() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new("mode");
    fs::write(scratch.0.join("plain"), "").unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode();
    save(&scratch.0.join("c"), 1).unwrap();
    for name in ["model.safetensors", "state.json", MANIFEST] {
        assert_eq!(mode(scratch.0.join("c").join(name)), mode(scratch.0.join("plain")));
    }
}

#[test]
fn the_newest_that_passes_is_found_and_old_ones_go() {
    let scratch = Scratch::new("newest");
    let at = |step| scratch.0.join(step_name(step));
    assert!(newest(&scratch.0.join("none")).unwrap().found.is_none());
    for step in [9, 10, 100_000_000, 11] {
        save(&at(step), step).unwrap();
    }
    fs::write(at(100_000_000).join("state.json"), "{\"step\": 4}\n").unwrap();
    fs::create_dir(at(12)).unwrap();
    fs::create_dir(scratch.0.join("step-13")).unwrap();
    let found = newest(&scratch.0).unwrap();
    assert_eq!(found.found.unwrap().0, 11);
    let skipped: Vec<_> = found.skipped.iter().map(file_of).collect();
    assert_eq!(skipped, [at(100_000_000).join("state.json"), at(12).join(MANIFEST)]);

    prune(&scratch.0, 3).unwrap();
    assert_eq!(names(&scratch.0), ["step-00000011", "step-00000012", "step-100000000", "step-13"]);
    prune(&scratch.0, 0).unwrap();
    assert_eq!(names(&scratch.0), ["step-100000000", "step-13"]);
}

#[test]
fn strays_go_but_what_is_being_written_stays() {
    let scratch = Scratch::new("strays");
    fs::create_dir(scratch.0.join("step-00000007.tmp-1")).unwrap();
    fs::write(scratch.0.join("step-00000007.tmp-1").join("model.safetensors"), "x").unwrap();
    fs::write(scratch.0.join("report.html.tmp-12"), "x").unwrap();
    fs::write(scratch.0.join("notes.tmp-x"), "x").unwrap();
    let writer = Writer::create(scratch.0.join("step-00000008")).unwrap();
    remove_strays(&scratch.0).unwrap();
    let mut left = vec!["notes.tmp-x".to_owned()];
    if cfg!(unix) {
        left.push(format!("step-00000008.tmp-{}", std::process::id()));
    }
    assert_eq!(names(&scratch.0), left);
    drop(writer);
}

const KEPT: usize = 3;
const FOLDER: &str = "TRANSFUSION_TEST_KILL_FOLDER";

/// The victim of the next test, which starts this binary anew; does nothing otherwise.
#[test]
fn saves_until_it_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    remove_strays(&folder).unwrap();
    prune(&folder, KEPT).unwrap();
    let first = newest(&folder).unwrap().found.map_or(0, |(step, _)| step + 1);
    for step in first.. {
        save(&folder.join(step_name(step)), step).unwrap();
        prune(&folder, KEPT).unwrap();
    }
}

#[test]
fn fifty_kills_leave_a_loadable_newest_checkpoint() {
    let scratch = Scratch::new("kills");
    save(&scratch.0.join(step_name(0)), 0).unwrap();
    let (mut last, mut caught_writing) = (0, 0);
    for kill in 0..50 {
        let mut victim = saver(&scratch.0);
        let writing = || names(&scratch.0).iter().any(|name| name.contains(".tmp-"));
        while !writing() {
            assert!(victim.try_wait().unwrap().is_none(), "the victim died by itself");
            std::thread::sleep(Duration::from_micros(200));
        }
        let pause = Stream::new(3, Purpose::Test, 0).below(kill, 30_000);
        std::thread::sleep(Duration::from_micros(u64::from(pause)));
        victim.kill().unwrap();
        victim.wait().unwrap();
        caught_writing += usize::from(writing());

        let found = newest(&scratch.0).unwrap();
        let (step, checkpoint) = found.found.expect("a loadable checkpoint");
        assert!(found.skipped.is_empty() && step >= last, "{step} after {last}: {:?}", found.skipped);
        let tensor = checkpoint.tensor("model.safetensors", "norm.weight").unwrap();
        assert_eq!(tensor.view().bytes(), expected("norm.weight", specs()[4].1, step).view().bytes());
        remove_strays(&scratch.0).unwrap();
        let left = names(&scratch.0);
        assert!(left.len() <= KEPT + 1 && left.iter().all(|name| !name.contains(".tmp-")), "{left:?}");
        last = step;
    }
    assert!(last > 0 && caught_writing >= 10, "step {last}, {caught_writing} kills while writing");
}

fn saver(folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "checkpoint::tests::saves_until_it_is_killed", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}
