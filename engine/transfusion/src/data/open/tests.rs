use super::*;
use std::fs;

/// A folder that is removed at the end of a test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("transfusion-open-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Folder {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        self
    }

    fn picture(&self, name: &str, colour: [u8; 3]) -> &Folder {
        self.write(name, Picture::filled(5, 9, colour).encode_png().unwrap())
    }

    fn open(&self) -> Result<Opened> {
        open(&[&self.0], &options())
    }

    fn file(&self, name: &str) -> Result<Opened> {
        open(&[self.0.join(name)], &options())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn options() -> OpenOptions {
    OpenOptions { resolution: 4, window: 5, threads: 3, ..OpenOptions::default() }
}

/// Every document as text, with a picture as the red of its first pixel.
fn spell(opened: &Opened) -> Vec<String> {
    let part = |part: &Part| match part {
        Part::Text(text) => String::from_utf8_lossy(text).into_owned(),
        Part::Image(picture) => {
            assert_eq!((picture.width(), picture.height()), (4, 4));
            format!("<{}>", picture.rgb()[0])
        }
    };
    let document = |i| opened.source.document(i).parts.iter().map(part).collect();
    (0..opened.source.len().unwrap()).map(document).collect()
}

fn why(opened: Result<Opened>) -> String {
    match opened {
        Ok(opened) => panic!("opened: {}", opened.report),
        Err(e) => e.to_string(),
    }
}

#[test]
fn metadata_lists_captioned_pictures() {
    let folder = Folder::new("metadata");
    folder.picture("b.png", [2; 3]).picture("sub/a.PNG", [1; 3]).picture("unlisted.png", [3; 3]);
    let lines = "\u{feff}{\"file_name\": \"sub/a.PNG\", \"text\": \" one\\n\", \"extra\": [1]}\r\n\r\n\
                 {\"text\": \"zw\u{f6}lf\", \"file_name\": \"./b.png\"}";
    folder.write("metadata.jsonl", lines);
    let opened = folder.open().unwrap();
    assert_eq!(spell(&opened), ["one<1>", "zw\u{f6}lf<2>"]);
    assert_eq!((opened.report.documents, opened.report.pictures), (2, 2));
    assert!(opened.validation.is_none() && opened.report.skipped.is_empty());
}

#[test]
fn sidecars_are_read_in_the_order_of_names() {
    let folder = Folder::new("sidecar");
    for (i, name) in ["b", "a", "B", "a-b", "sub/c", "sub/a"].iter().enumerate() {
        folder
            .picture(&format!("{name}.png"), [i as u8; 3])
            .write(&format!("{name}.txt"), format!("{name}\r\n"));
    }
    folder.write(".hidden.png", "x").write(".git/a.png", "x").write("notes.md", "x");
    assert_eq!(spell(&folder.open().unwrap()), ["B<2>", "a-b<3>", "a<1>", "b<0>", "sub/a<5>", "sub/c<4>"]);
}

#[cfg(unix)]
#[test]
fn links_that_lead_back_are_survived() {
    let folder = Folder::new("links");
    folder.picture("sub/a.png", [1; 3]).write("sub/a.txt", "a");
    std::os::unix::fs::symlink("..", folder.0.join("sub/up")).unwrap();
    std::os::unix::fs::symlink(".", folder.0.join("here")).unwrap();
    assert_eq!(spell(&folder.open().unwrap()), ["a<1>"]);
    std::os::unix::fs::symlink("nowhere", folder.0.join("broken.png")).unwrap();
    assert!(why(folder.open()).contains("broken.png"));
}

#[test]
fn interleaved_documents_share_pictures() {
    let folder = Folder::new("interleaved");
    folder.picture("p/a.png", [7; 3]).write(
        "d.jsonl",
        "{\"parts\": [{\"text\": \"x\"}, {\"image\": \"p/a.png\"}, {\"text\": \"\"}, {\"text\": \"y\", \"k\": 1}], \"id\": 3}\n\
         {\"parts\": [{\"image\": \"p/a.png\"}]}\n",
    );
    let opened = folder.file("d.jsonl").unwrap();
    assert_eq!(spell(&opened), ["x<7>y", "<7>"]);
    assert_eq!((opened.report.documents, opened.report.pictures), (2, 1));
}

#[test]
fn texts() {
    let folder = Folder::new("texts");
    folder.write("b.txt", "defghij").write("a.txt", b"ab\xff");
    let opened = folder.open().unwrap();
    assert_eq!((opened.report.text_files, opened.report.text_bytes), (2, 10));
    assert_eq!(opened.source.len(), None);
    let consecutive = OpenOptions { consecutive: true, ..options() };
    assert_eq!(spell(&open(&[&folder.0], &consecutive).unwrap()), ["ab\u{fffd}", "defgh", "hij"]);
    let last = OpenOptions { holdout: Holdout::Last(4), ..options() };
    let opened = open(&[folder.0.join("b.txt")], &last).unwrap();
    assert_eq!(opened.validation.unwrap().document(0).parts, [Part::Text(b"ghij".to_vec())]);
    for i in 0..20 {
        assert_eq!(opened.source.document(i).parts, [Part::Text(b"def".to_vec())]);
    }
}

#[test]
fn shapes_are_endless_and_validate_on_held_out_kinds() {
    let opened = open(&["shapes"], &OpenOptions { holdout: Holdout::Fraction(0.1), ..options() }).unwrap();
    assert_eq!(opened.source.len(), None);
    let validation = opened.validation.unwrap();
    assert_eq!(validation.len(), Some(VALIDATION_SHAPES));
    for (source, held_out) in [(opened.source, false), (validation, true)] {
        let Part::Text(caption) = &source.document(3).parts[0] else { panic!() };
        let scene = crate::data::shapes::Scene::parse(std::str::from_utf8(caption).unwrap()).unwrap();
        assert_eq!(scene.objects().iter().any(|o| o.held_out()), held_out);
    }
}

#[test]
fn several_paths_are_mixed() {
    let folder = Folder::new("mixed");
    folder.picture("one/a.png", [1; 3]).write("one/a.txt", "a");
    folder.picture("two/b.png", [2; 3]).write("two/b.txt", "b").write("t/t.txt", "text and more text");
    let at = |name: &str| folder.0.join(name);
    let both = open(&[at("one"), at("two")], &options()).unwrap();
    assert_eq!(spell(&both), ["a<1>", "b<2>"]);
    let all = open(&[at("one"), at("t"), at("two"), "shapes".into()], &options()).unwrap();
    assert_eq!((all.source.len(), all.report.documents, all.report.text_files), (None, 2, 1));
    let stream: Vec<bool> = (0..6).map(|i| all.source.document(i).stream).collect();
    assert_eq!(stream, [true, false, false, true, false, false]);
}

/// A folder of `count` good documents and one line that is not.
fn one_bad_line(name: &str, count: usize, bad: impl AsRef<[u8]>) -> Folder {
    let folder = Folder::new(name);
    let mut lines = Vec::new();
    for i in 0..count {
        folder.picture(&format!("{i}.png"), [9; 3]);
        lines.extend(format!("{{\"file_name\": \"{i}.png\", \"text\": \"t\"}}\n").into_bytes());
    }
    lines.extend_from_slice(bad.as_ref());
    folder.write("metadata.jsonl", lines);
    folder
}

#[test]
fn one_in_a_hundred_may_be_broken() {
    let bad = "{\"file_name\": \"none.png\", \"text\": \"t\"}";
    let opened = one_bad_line("hundred", 99, bad).open().unwrap();
    assert_eq!((opened.report.documents, opened.report.skipped.len()), (99, 1));
    let report = opened.report.to_string();
    assert!(report.contains("1 skipped") && report.contains("metadata.jsonl:100"), "{report}");
    for count in [19, 98] {
        let why = why(one_bad_line("fewer", count, bad).open());
        assert!(why.contains(&format!("1 of {} documents", count + 1)) && why.contains("none.png"), "{why}");
        assert!(!why.contains('\n'));
    }
}

#[test]
fn broken_lines_are_named() {
    let picture = |name: &str| format!("{{\"file_name\": {name:?}, \"text\": \"t\"}}");
    let long = format!("{{\"file_name\": \"1.png\", \"text\": \"{}\"}}\n", "x".repeat(17 << 20));
    for (i, (bad, reason)) in [
        (b"{\"file_name\": \"1.png\"".to_vec(), "EOF"),
        (b"not json".to_vec(), "expected"),
        (b"[1, 2]".to_vec(), "expected"),
        (b"{\"file_name\": \"1.png\"}".to_vec(), "missing field `text`"),
        (b"{\"text\": \"t\"}".to_vec(), "missing field `file_name`"),
        (b"{\"file_name\": 3, \"text\": \"t\"}".to_vec(), "invalid type"),
        (b"{\"file_name\": \"1.png\", \"text\": null}".to_vec(), "invalid type"),
        (b"{\"file_name\": \"1.png\", \"text\": \" \\n\"}".to_vec(), "caption is empty"),
        (b"{\"file_name\": \"1.png\", \"text\": \"\xff\"}".to_vec(), "not UTF-8"),
        (picture("0.png").into_bytes(), "is on line 1 too"),
        (picture("none.png").into_bytes(), "none.png"),
        (picture("../x/0.png").into_bytes(), "inside of the data's folder"),
        (picture("/etc/passwd").into_bytes(), "inside of the data's folder"),
        (picture("a\0b").into_bytes(), "expected"),
        (picture("").into_bytes(), "inside of the data's folder"),
        (picture(".").into_bytes(), "not a regular file"),
        (picture(&"a".repeat(5000)).into_bytes(), "name too long"),
        (picture("metadata.jsonl").into_bytes(), "neither PNG nor JPEG"),
        ("[".repeat(100_000).into_bytes(), "expected"),
        (long.into_bytes(), "longer than 16 MiB"),
    ]
    .into_iter()
    .enumerate()
    {
        let why = why(one_bad_line(&format!("line{i}"), 1, &bad).open());
        let named = why.contains("metadata.jsonl:2: ");
        assert!(named && why.to_lowercase().contains(&reason.to_lowercase()), "{reason}: {why}");
    }
}

#[test]
fn broken_interleaved_documents_are_named() {
    for (bad, reason) in [
        ("{\"parts\": []}", "empty"),
        ("{\"parts\": [{\"text\": \"\"}]}", "empty"),
        ("{\"parts\": [{}]}", "either"),
        ("{\"parts\": [{\"text\": \"a\", \"image\": \"a.png\"}]}", "either"),
        ("{\"parts\": [{\"image\": \"none.png\"}]}", "none.png"),
        ("{\"parts\": [{\"image\": \"../a.png\"}]}", "inside"),
        ("{\"parts\": \"text\"}", "invalid type"),
        ("{\"file_name\": \"a.png\", \"text\": \"t\"}", "name the folder"),
    ] {
        let folder = Folder::new("broken-interleaved");
        folder.write("d.jsonl", format!("{{\"parts\": [{{\"text\": \"a\"}}]}}\n{bad}\n"));
        let why = why(folder.file("d.jsonl"));
        assert!(why.contains("d.jsonl:2: ") && why.contains(reason), "{bad}: {why}");
    }
}

#[test]
fn broken_folders_are_refused() {
    let empty = Folder::new("empty");
    assert!(why(empty.open()).contains("holds neither"));
    let nothing_useful = Folder::new("useless");
    nothing_useful.write("a.gif", "GIF89a").write("sub/b.csv", "a,b");
    assert!(why(nothing_useful.open()).contains("holds neither"));
    let no_captions = Folder::new("captions");
    no_captions.picture("a.png", [1; 3]).write("b.txt", "b");
    assert!(why(no_captions.open()).contains("no caption in"));
    let latin = Folder::new("latin");
    latin.picture("a.png", [1; 3]).write("a.txt", b"caf\xe9");
    assert!(why(latin.open()).contains("not UTF-8"));
    let no_picture = Folder::new("picture");
    no_picture.write("a.png", "text").write("a.txt", "a");
    assert!(why(no_picture.open()).contains("a.png: neither PNG nor JPEG"));
    let blank = Folder::new("blank");
    blank.write("metadata.jsonl", "\n\n");
    assert!(why(blank.open()).contains("no document"));
    let folder_as_metadata = Folder::new("folder");
    folder_as_metadata.write("metadata.jsonl/x", "");
    assert!(why(folder_as_metadata.open()).contains("metadata.jsonl"));
    let empty_texts = Folder::new("empty-texts");
    empty_texts.write("a.txt", "");
    assert!(why(empty_texts.open()).contains("a.txt: the file is empty"));
}

#[test]
fn wrong_paths_are_refused() {
    let folder = Folder::new("paths");
    folder.picture("a.png", [1; 3]).write("a.csv", "a,b").write("a.txt", "abc");
    for (name, reason) in [("none", "none"), ("a.png", "name the folder"), ("a.csv", "a .txt file")] {
        assert!(why(folder.file(name)).contains(reason));
    }
    assert!(why(open::<&Path>(&[], &options())).contains("no document"));
    let all = OpenOptions { holdout: Holdout::Last(3), ..options() };
    assert!(why(open(&[folder.0.join("a.txt")], &all)).contains("3 of 3 bytes"));
}

#[test]
fn the_budget_is_kept() {
    let folder = Folder::new("budget");
    folder.picture("a.png", [1; 3]).write("a.txt", "a caption");
    let tight = OpenOptions { budget: 47, ..options() };
    assert!(why(open(&[&folder.0], &tight)).contains("raise the budget"));
    assert!(open(&[&folder.0], &OpenOptions { budget: 48, ..options() }).is_ok());
    assert!(why(open(&[folder.0.join("a.txt")], &OpenOptions { budget: 8, ..options() })).contains("budget"));
}
