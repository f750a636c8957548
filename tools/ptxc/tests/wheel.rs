//! Fetching the pinned tools, with programs in the place of Python that do what can go wrong.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use transfusion_ptxc::{
    Error,
    wheel::{Cache, Wheel},
};

/// A "wheel" whose bytes are `hello`.
const HELLO: Wheel = Wheel {
    package: "hello",
    version: "1.0",
    file: "hello-1.0-py3-none-any.whl",
    sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
};

/// A folder of its own for one test.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let dir =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("wheel-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("cache")).unwrap();
        Place(dir)
    }

    fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// A cache whose Python downloads and unpacks with these lines of shell, in which `$to` is the folder of
    /// the download, and `$file` and `$into` are what is unpacked.
    fn with(&self, download: &str, unpack: &str) -> Cache {
        let script = self.0.join("python");
        let text = format!(
            "#!/bin/sh\nif [ \"$2\" = pip ]; then\n  while [ \"$1\" != --dest ]; do shift; done; to=$2\n  {download}\n\
             else\n  file=$4; into=$5\n  {unpack}\nfi\n"
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        Cache::new(self.cache()).with_python(script)
    }

    fn left(&self) -> Vec<String> {
        let names =
            fs::read_dir(self.cache()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const GOOD: &str = "printf hello > \"$to/hello-1.0-py3-none-any.whl\"";
const UNPACK: &str = "mkdir -p \"$into\"; cp \"$file\" \"$into/lib\"";

fn contents(dir: &Path) -> String {
    fs::read_to_string(dir.join("lib")).unwrap()
}

#[test]
fn a_wheel_is_fetched_once() {
    let place = Place::new("once");
    let home = place.with(GOOD, UNPACK).get(&HELLO).unwrap();
    assert_eq!(contents(&home), "hello");
    assert_eq!(place.left(), ["hello-1.0"]);
    let again = place.with("exit 1", "exit 1").get(&HELLO).unwrap();
    assert_eq!(again, home);
}

#[test]
fn a_wheel_with_another_hash_is_refused_and_removed() {
    let place = Place::new("hash");
    let wrong = "printf hullo > \"$to/hello-1.0-py3-none-any.whl\"";
    let error = place.with(wrong, UNPACK).get(&HELLO).unwrap_err();
    assert!(
        matches!(&error, Error::Hash { want, found, .. } if want == HELLO.sha256 && found != want),
        "{error}"
    );
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn a_wheel_put_there_by_hand_needs_no_network_and_is_held_against_its_hash() {
    let place = Place::new("hand");
    let by_hand = place.cache().join(HELLO.file);
    fs::write(&by_hand, "hullo").unwrap();
    let offline = place.with("echo no network >&2; exit 1", UNPACK);
    let error = offline.get(&HELLO).unwrap_err();
    assert!(matches!(&error, Error::Hash { path, .. } if *path == by_hand), "{error}");
    assert!(place.left().is_empty(), "{:?}", place.left());

    fs::write(&by_hand, "hello").unwrap();
    assert_eq!(contents(&offline.get(&HELLO).unwrap()), "hello");
}

#[test]
fn an_interrupted_fetch_leaves_nothing_half() {
    let place = Place::new("half");
    let half = "printf hel > \"$to/hello-1.0-py3-none-any.whl\"; echo connection lost >&2; exit 1";
    let error = place.with(half, UNPACK).get(&HELLO).unwrap_err();
    assert!(matches!(&error, Error::Download { why, .. } if why == "connection lost"), "{error}");
    assert!(
        error.hint().unwrap().contains(&format!("put it at {}", place.cache().join(HELLO.file).display()))
    );
    assert!(place.left().is_empty(), "{:?}", place.left());

    let full_disk = "mkdir -p \"$into\"; printf hel > \"$into/lib\"; echo disk full >&2; exit 1";
    let error = place.with(GOOD, full_disk).get(&HELLO).unwrap_err();
    assert!(matches!(&error, Error::File { why, .. } if why == "disk full"), "{error}");
    assert!(place.left().is_empty(), "{:?}", place.left());
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let place = Place::new("killed");
    let left = place.cache().join("fetch-4294967295-0/unpacked");
    fs::create_dir_all(&left).unwrap();
    let ours = place.cache().join(format!("fetch-{}-999", std::process::id()));
    fs::create_dir_all(&ours).unwrap();
    place.with(GOOD, UNPACK).get(&HELLO).unwrap();
    assert!(!left.exists());
    assert!(ours.exists(), "a fetch of a living process is left alone");
}

#[test]
fn no_python_and_no_pip_are_said() {
    let place = Place::new("python");
    let cache = Cache::new(place.cache()).with_python("/nowhere/python3");
    let error = cache.get(&HELLO).unwrap_err();
    assert!(
        matches!(&error, Error::Python { why } if why.starts_with("/nowhere/python3: No such file")),
        "{error}"
    );
    let no_pip = "echo \"/usr/bin/python3: No module named pip\" >&2; exit 1";
    let error = place.with(no_pip, UNPACK).get(&HELLO).unwrap_err();
    assert!(matches!(&error, Error::Python { why } if why.ends_with("No module named pip")), "{error}");
    assert!(error.hint().unwrap().contains("python3-pip"));
}
