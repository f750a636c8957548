//! The formulas of a contract as numbers: `T/64,H,B`, `16384 + 4(BM+BN)`, `C % 8 == 0`.
//!
//! ```text
//! list      = sum { "," sum }
//! condition = sum ( "==" | "<=" ) sum
//! sum       = product { ( "+" | "-" ) product }
//! product   = factor { [ "*" ] factor | "/" factor | "%" factor }        quotients are rounded up
//! factor    = number | name | "min(" sum "," sum ")" | "(" sum ")"
//! name      = capital { lower-case } | lower-case { lower-case | digit | "_" }
//! ```
use std::{collections::BTreeMap, iter::Peekable, str::Chars};

/// What the names of formulas stand for.
pub(super) type Names = BTreeMap<String, u64>;

/// The numbers of a list.
pub(super) fn numbers(text: &str, names: &Names) -> Result<Vec<u64>, String> {
    let mut parser = Parser { rest: text.chars().peekable(), names };
    let mut numbers = vec![parser.sum()?];
    while parser.takes(',') {
        numbers.push(parser.sum()?);
    }
    parser.ends(text)?;
    Ok(numbers)
}

/// The number of a formula.
pub(super) fn number(text: &str, names: &Names) -> Result<u64, String> {
    match numbers(text, names)?[..] {
        [n] => Ok(n),
        _ => Err(format!("{text}: one number is wanted")),
    }
}

/// Whether a condition holds.
pub(super) fn holds(text: &str, names: &Names) -> Result<bool, String> {
    let both = |(a, b)| Ok::<_, String>((number(a, names)?, number(b, names)?));
    if let Some(sides) = text.split_once("==") {
        return both(sides).map(|(a, b)| a == b);
    }
    let sides = text.split_once("<=").ok_or_else(|| format!("{text}: == or <= is wanted"))?;
    both(sides).map(|(a, b)| a <= b)
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    names: &'a Names,
}

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        while self.rest.next_if(|c| c.is_whitespace()).is_some() {}
        self.rest.peek().copied()
    }

    fn takes(&mut self, c: char) -> bool {
        self.next() == Some(c) && self.rest.next().is_some()
    }

    fn ends(&mut self, text: &str) -> Result<(), String> {
        self.next().map_or(Ok(()), |c| Err(format!("{text}: `{c}` is out of place")))
    }

    fn sum(&mut self) -> Result<u64, String> {
        let mut sum = self.product()?;
        loop {
            if self.takes('+') {
                sum += self.product()?;
            } else if self.takes('-') {
                sum = sum.checked_sub(self.product()?).ok_or("a number below zero")?;
            } else {
                return Ok(sum);
            }
        }
    }

    fn product(&mut self) -> Result<u64, String> {
        let mut product = self.factor()?;
        loop {
            if self.takes('/') {
                product = product.div_ceil(self.factor()?.max(1));
            } else if self.takes('%') {
                product %= self.factor()?.max(1);
            } else if self.takes('*') || self.next().is_some_and(|c| c.is_alphanumeric() || c == '(') {
                product *= self.factor()?;
            } else {
                return Ok(product);
            }
        }
    }

    fn factor(&mut self) -> Result<u64, String> {
        if self.takes('(') {
            let inside = self.sum()?;
            return if self.takes(')') { Ok(inside) } else { Err("`)` is wanted".into()) };
        }
        let first = self.next().filter(char::is_ascii_alphanumeric).ok_or("a number is wanted")?;
        let goes_on = |c: &char| match first {
            '0'..='9' => c.is_ascii_digit(),
            'A'..='Z' => c.is_ascii_lowercase(),
            _ => c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_',
        };
        let mut word: String = self.rest.next().into_iter().collect();
        while let Some(c) = self.rest.next_if(goes_on) {
            word.push(c);
        }
        if first.is_ascii_digit() {
            return word.parse().map_err(|_| format!("{word} is too large"));
        }
        if word != "min" {
            return self.names.get(&word).copied().ok_or_else(|| format!("what is {word}?"));
        }
        let least = if self.takes('(') { self.sum()? } else { return Err("`(` is wanted".into()) };
        let least = if self.takes(',') { self.sum()?.min(least) } else { return Err("`,` is wanted".into()) };
        if self.takes(')') { Ok(least) } else { Err("`)` is wanted".into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        [("T", 130), ("Tk", 7), ("H", 3), ("G", 2), ("D", 64), ("sms", 108)]
            .map(|(name, n)| (name.to_string(), n))
            .into()
    }

    #[test]
    fn formulas_of_contracts() {
        let of = |text| numbers(text, &names());
        assert_eq!(of("T/128,H,1"), Ok(vec![2, 3, 1]));
        assert_eq!(of("min(T/8,4*sms)"), Ok(vec![17]));
        assert_eq!(of("2(2TH+2TkH/G)D"), Ok(vec![2 * (2 * 130 * 3 + 21) * 64]));
        assert_eq!(of("16 + 3 T - 6"), Ok(vec![400]));
        assert_eq!(holds("D % 16 == 0", &names()), Ok(true));
        assert_eq!(holds("T <= 129", &names()), Ok(false));
    }

    #[test]
    fn what_is_no_formula_is_refused() {
        for (text, why) in [
            ("X", "what is X?"),
            ("T,", "a number is wanted"),
            ("(T", "`)` is wanted"),
            ("T)", "T): `)` is out of place"),
            ("H-T", "a number below zero"),
        ] {
            assert_eq!(numbers(text, &names()), Err(why.into()), "{text}");
        }
        assert!(number("T,H", &names()).is_err() && holds("T", &names()).is_err());
    }
}
