//! The process on the other side: PyTorch under `benches/torch`, spoken to in lines of JSON, a request and its
//! answer at a time. While it is not asked it is blocked in a read, so that ours may be timed beside it.
use crate::{
    error::{Error, Result},
    folder::Folder,
};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// The scripts, which travel inside this program.
const SCRIPTS: [(&str, &str); 10] = [
    ("attention.py", include_str!("../torch/attention.py")),
    ("clock.py", include_str!("../torch/clock.py")),
    (COLD, include_str!("../torch/cold.py")),
    ("model.py", include_str!("../torch/model.py")),
    ("ops.py", include_str!("../torch/ops.py")),
    ("peer.py", include_str!("../torch/peer.py")),
    ("precision.py", include_str!("../torch/precision.py")),
    ("sample.py", include_str!("../torch/sample.py")),
    ("step.py", include_str!("../torch/step.py")),
    ("tensors.py", include_str!("../torch/tensors.py")),
];

/// The script that is a process of its own: a cold start.
pub const COLD: &str = "cold.py";

/// A conversation.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    /// Closed first: then the process ends by itself.
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// The interpreter.
    pub python: PathBuf,
    /// What it writes to stderr.
    log: PathBuf,
    folder: Folder,
    /// The version of PyTorch.
    pub version: String,
    /// `cpu`, `cuda:0`: as PyTorch names it.
    pub device: String,
    /// The only variants that are measured; all, if there are none.
    pub only: Vec<String>,
}

impl Peer {
    /// Starts PyTorch under an interpreter, for `cpu` or `cuda:N`, with so many threads.
    ///
    /// # Errors
    /// If there is no such interpreter, it has no PyTorch, or PyTorch sees no such device.
    pub fn start(python: &Path, device: &str, threads: usize) -> Result<Peer> {
        let folder = Folder::new()?;
        for (name, text) in SCRIPTS {
            folder.text(name, text)?;
        }
        let log = folder.text("peer.log", "")?;
        let mut command = Command::new(python);
        command.arg(folder.path().join("peer.py")).env("PYTHONDONTWRITEBYTECODE", "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::options().append(true).open(&log).map_or(Stdio::null(), Stdio::from));
        #[cfg(unix)]
        {
            // Ctrl-C is ours to handle; the other side ends when its requests do.
            use std::os::unix::process::CommandExt;
            command.process_group(0);
        }
        let mut child = command.spawn().map_err(|e| no_interpreter(python, &e))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::peer("the process on the other side has no pipes"));
        };
        let answers = BufReader::new(answers);
        let (requests, python) = (Some(requests), python.to_path_buf());
        let (version, device, only) = (String::new(), device.to_string(), vec![]);
        let mut peer = Peer { child, requests, answers, python, log, folder, version, device, only };
        let hello = peer.ask(json!({ "do": "hello", "device": peer.device, "threads": threads }))?;
        peer.version = hello["torch"].as_str().unwrap_or("unknown").into();
        Ok(peer)
    }

    /// A folder that both sides may use.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What the other side says is wrong, or that it is no more.
    pub fn ask(&mut self, request: Value) -> Result<Value> {
        let line = format!("{request}\n");
        let mut answer = String::new();
        let told = self.requests.as_mut().map(|r| r.write_all(line.as_bytes()).and_then(|()| r.flush()));
        // A process that is ending may have left an answer behind, which says why.
        let read = self.answers.read_line(&mut answer);
        let what = request["do"].as_str().unwrap_or("?");
        let answer: Value = match (told, read) {
            (_, Ok(n)) if n > 0 => serde_json::from_str(&answer).map_err(|e| {
                Error::peer(format!("{what}: the answer is no JSON ({e}): {}", answer.trim()))
            })?,
            _ => return Err(self.gone(what)),
        };
        match answer["error"].as_str() {
            None => Ok(answer),
            Some(why) if answer["missing"] == "torch" => Err(self.no_torch(why)),
            Some(why) => Err(Error::peer(format!("PyTorch, {what}: {why}"))),
        }
    }

    fn no_torch(&self, why: &str) -> Error {
        let python = self.python.display();
        Error::peer(format!("{python} has no PyTorch: {why}")).with_remedy(format!(
            "`{python} -m pip install torch` installs it; --python names another interpreter"
        ))
    }

    fn gone(&mut self, during: &str) -> Error {
        let status = self.child.wait().map_or("gone".into(), |s| s.to_string());
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it said nothing");
        let python = self.python.display();
        Error::peer(format!("{python} ended during {during} ({status}): {last}"))
            .with_remedy("--python names an interpreter that has PyTorch")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.requests.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn no_interpreter(python: &Path, e: &std::io::Error) -> Error {
    let python = python.display();
    let what = match e.kind() {
        ErrorKind::NotFound => format!("there is no interpreter {python}"),
        _ => format!("{python} cannot be started: {e}"),
    };
    Error::peer(what)
        .with_remedy("--python names a Python that has PyTorch; without --against none is needed")
}

/// The numbers of an answer's field.
///
/// # Errors
/// If they are missing.
pub fn numbers(answer: &Value, field: &str) -> Result<Vec<f64>> {
    let list =
        answer[field].as_array().map(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>());
    list.flatten().ok_or_else(|| Error::peer(format!("the answer has no numbers {field}: {answer}")))
}

/// The words of an answer's field.
///
/// # Errors
/// If they are missing.
pub fn words(answer: &Value, field: &str) -> Result<Vec<String>> {
    let word = |v: &Value| v.as_str().map(String::from);
    let list = answer[field].as_array().map(|list| list.iter().map(word).collect::<Option<Vec<_>>>());
    list.flatten().ok_or_else(|| Error::peer(format!("the answer has no words {field}: {answer}")))
}

/// A pretended other side, for tests: a shell script that answers a request whose line holds a word with a line.
#[cfg(all(test, unix))]
pub(crate) mod pretended {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// An interpreter in a folder: `answers` are words and what is printed, or done if it begins with `!`.
    pub(crate) fn python(folder: &Folder, answers: &[(&str, &str)]) -> PathBuf {
        let mut script = String::from("#!/bin/sh\nwhile read -r line; do case \"$line\" in\n");
        for (word, answer) in answers {
            let does = answer.strip_prefix('!').map_or_else(|| format!("echo '{answer}'"), String::from);
            script += &format!("*'{word}'*) {does};;\n");
        }
        let path = folder.text("python", &(script + "*) echo '{}';;\nesac; done\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A conversation with it.
    pub(crate) fn peer(folder: &Folder, answers: &[(&str, &str)]) -> Peer {
        let hello = [("hello", r#"{"torch": "9.9"}"#)];
        Peer::start(&python(folder, &[&hello, answers].concat()), "cpu", 2).unwrap()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use pretended::{peer, python};

    fn remedy(e: Error) -> (String, String) {
        match e {
            Error::Peer { what, remedy } => (what, remedy.unwrap_or_default()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn requests_are_answered_line_by_line() {
        let folder = Folder::new().unwrap();
        let mut peer =
            peer(&folder, &[("one", r#"{"ms": [1, 2.5]}"#), ("two", r#"{"variants": ["a", "b c"]}"#)]);
        assert_eq!((peer.version.as_str(), peer.device.as_str()), ("9.9", "cpu"));
        assert_eq!(numbers(&peer.ask(json!({ "do": "one" })).unwrap(), "ms").unwrap(), [1.0, 2.5]);
        let told = peer.ask(json!({ "do": "two" })).unwrap();
        assert_eq!(words(&told, "variants").unwrap(), ["a", "b c"]);
        assert!(
            numbers(&told, "variants").is_err()
                && numbers(&told, "ms").is_err()
                && words(&told, "x").is_err()
        );
        let scripts = peer.folder().path().to_path_buf();
        for (name, _) in SCRIPTS {
            assert!(scripts.join(name).is_file(), "{name}");
        }
        drop(peer);
        assert!(!scripts.exists(), "its folder goes with it");
    }

    #[test]
    fn what_goes_wrong_is_said_with_a_remedy() {
        let folder = Folder::new().unwrap();
        let absent = Peer::start(Path::new("/no/such/python"), "cpu", 1).unwrap_err();
        let (what, help) = remedy(absent);
        assert!(what.contains("/no/such/python") && help.contains("--python"), "{what}: {help}");
        let without =
            python(&folder, &[("hello", r#"{"error": "No module named torch", "missing": "torch"}"#)]);
        let (what, help) = remedy(Peer::start(&without, "cpu", 1).unwrap_err());
        assert!(what.contains("has no PyTorch") && help.contains("-m pip install torch"), "{what}: {help}");
        let mut peer = peer(
            &folder,
            &[
                ("refused", r#"{"error": "ValueError: no"}"#),
                ("babble", "this is no JSON"),
                ("die", "!echo segmentation fault >&2; exit 3"),
            ],
        );
        let mut says = |what: &str| remedy(peer.ask(json!({ "do": what })).unwrap_err()).0;
        assert!(says("refused").contains("PyTorch, refused: ValueError: no"));
        assert!(says("babble").contains("is no JSON"));
        let last = says("die");
        assert!(last.contains("ended during die (exit status: 3): segmentation fault"), "{last}");
        assert!(says("again").contains("ended during again"));
    }
}
