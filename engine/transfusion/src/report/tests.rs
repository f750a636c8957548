use super::*;
use crate::run_dir::tests::Scratch;

fn series(kind: Kind, points: &[(f64, f64)]) -> Vec<Series> {
    vec![Series::new("a", kind, points.iter().copied())]
}

#[test]
fn base64_is_that_of_the_rfc() {
    for (plain, coded) in [
        ("", ""),
        ("f", "Zg=="),
        ("fo", "Zm8="),
        ("foo", "Zm9v"),
        ("foob", "Zm9vYg=="),
        ("fooba", "Zm9vYmE="),
        ("foobar", "Zm9vYmFy"),
    ] {
        assert_eq!(base64(plain.as_bytes()), coded);
    }
    assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
}

#[test]
fn no_text_becomes_markup() {
    let evil = "</title><script>alert('1')</script>&\"\u{0}";
    let mut report = Report::new(evil);
    let pair = [(evil.to_owned(), evil.to_owned())];
    report.heading(evil).text(evil).figures(&pair).summary(&pair);
    report.curve(evil, evil, Scale::Log, &[Series::new(evil, Kind::Marked, [(1.0, 2.0), (2.0, 1.0)])]);
    report.bars(evil, evil, &[evil.to_owned()], &[(evil.to_owned(), vec![1.0])]);
    report.table(evil, &[evil], &[vec![evil.to_owned()]]);
    report.pictures(evil, &[Picture { png: vec![], captions: vec![evil.to_owned(), evil.to_owned()] }]);
    let html = report.html();
    assert!(!html.contains("<script") && !html.contains('\u{0}') && !html.contains("'1'"));
    assert!(html.matches("&lt;script&gt;").count() > 20);
    assert_balanced(&html);
}

/// Every tag that is opened is closed, in order.
fn assert_balanced(html: &str) {
    let mut open = Vec::new();
    let body = html.split_once("<body>").and_then(|(_, rest)| rest.split_once("</body>")).unwrap().0;
    for tag in body.split('<').skip(1).map(|t| t.split_once('>').unwrap().0) {
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') && !tag.starts_with("img") {
            open.push(tag.split(' ').next().unwrap());
        }
    }
}

#[test]
fn charts_of_any_numbers_are_drawn_inside() {
    let strange =
        [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1.0, 1e-300, 1e300, 5.0, f64::MAX, f64::MIN];
    let mut cases: Vec<Vec<(f64, f64)>> =
        vec![vec![], (0..1000).map(|i| (f64::from(i), f64::from(i % 7))).collect()];
    for &a in &strange {
        cases.push(vec![(1.0, a)]);
        cases.extend(strange.iter().map(|&b| vec![(1.0, a), (2.0, b), (b, 3.0)]));
    }
    for points in cases {
        for scale in [Scale::Linear, Scale::Log] {
            for kind in [Kind::Line, Kind::Smoothed, Kind::Marked, Kind::Dashed] {
                assert_drawn_inside(&chart::curve("t", "y", scale, &series(kind, &points)), &points);
            }
        }
        let values = points.iter().map(|p| p.1).collect();
        let groups = vec!["g".to_owned(); points.len()];
        assert_drawn_inside(&chart::bars("t", "y", &groups, &[("a".to_owned(), values)]), &points);
    }
}

fn assert_drawn_inside(svg: &str, points: &[(f64, f64)]) {
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{points:?}: {svg}");
    for d in svg.split(" d=\"").skip(1).map(|d| d.split_once('"').unwrap().0) {
        for pair in d.split(['M', 'L']).filter(|pair| !pair.is_empty() && !pair.contains('H')) {
            let (x, y) = pair.split_once(' ').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=480.0).contains(&x) && (0.0..=270.0).contains(&y), "{points:?}: {pair}");
        }
    }
}

#[test]
fn gaps_split_lines_and_ticks_are_round() {
    let points = [(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 4.0), (10_000.0, 5.0)];
    let svg = chart::curve("Loss", "nats", Scale::Linear, &series(Kind::Line, &points));
    let line = svg.split("class=\"l c0\" d=\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!((line.matches('M').count(), line.matches('L').count()), (2, 2));
    for tick in [">0<", ">1<", ">5<", ">2000<", ">10k<", ">step<"] {
        assert!(svg.contains(tick), "{tick}: {svg}");
    }
    let svg = chart::curve("Rate", "", Scale::Log, &series(Kind::Line, &[(0.0, 3e-5), (1.0, 1e-3)]));
    for tick in [">2e-5<", ">5e-5<", ">0.0001<", ">0.001<", "log scale"] {
        assert!(svg.contains(tick), "{tick}: {svg}");
    }
}

#[test]
fn a_smoothed_line_neither_lags_nor_shifts() {
    let falling: Vec<_> = (0..200).map(|i| (f64::from(i), 200.0 - f64::from(i))).collect();
    let svg = chart::curve("t", "", Scale::Linear, &series(Kind::Smoothed, &falling));
    let lines: Vec<_> = svg.split(" d=\"").map(|d| d.split('"').next().unwrap()).collect();
    let [raw, smoothed] = &lines[lines.len() - 2..] else { panic!("{svg}") };
    let same = raw.split('L').zip(smoothed.split('L')).take_while(|(a, b)| a == b).count();
    assert!(same >= 195, "{same}: {smoothed}");
}

#[test]
fn small_pictures_are_enlarged_by_whole_pixels() {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.extend([0, 0, 0, 48, 0, 0, 0, 32, 8, 2, 0, 0, 0]);
    let html = picture(&Picture { png, captions: vec!["a red square".to_owned()] });
    assert!(html.contains("class=\"pixels\" width=\"96\" height=\"64\" alt=\"a red square\""), "{html}");
    assert!(html.contains("<figcaption>a red square</figcaption>"));
}

#[test]
fn numeric_columns_are_aligned_and_the_page_is_written_whole() {
    let scratch = Scratch::new("report");
    let mut report = Report::new("demo");
    let rows = [vec!["colour".to_owned(), "98.5 %".to_owned()], vec!["shape".to_owned(), "-1".to_owned()]];
    report.table("Scores", &["what", "value"], &rows);
    let path = scratch.0.join("report.html");
    report.write(&path).unwrap();
    let html = std::fs::read_to_string(&path).unwrap();
    assert_eq!(html, report.html());
    assert!(html.contains("<td>colour</td><td class=\"n\">98.5 %</td>"));
    assert!(html.starts_with("<!DOCTYPE html>") && !html.contains("http"));
    assert_balanced(&html);
}
